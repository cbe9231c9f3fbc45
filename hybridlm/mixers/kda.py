"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692).

S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T      one decay per key channel
log a_t = -exp(A_log) softplus(f_t + dt_bias)                          or, with a lower bound b < 0,
log a_t = b sigmoid(exp(A_log) (f_t + dt_bias)),       f_t = W_f2 W_f1 x_t,   beta_t = sigmoid(W_b x_t)
y = W_o (rmsnorm(o) * sigmoid(W_g2 W_g1 x)),   q, k, v = silu(conv(W x)),  q and k of unit length
Ling 3 (transformers 5.24, models/bailing_hybrid) has one matrix in place of W_f2 W_f1, and of W_g2 W_g1.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, grouped, grouped_fields, linears
from hybridlm.convert.rules import Rule, bias, linear, norm, reshaped, same, short_convs
from hybridlm.fields import INT32, Limits
from hybridlm.layers import Linear, param, side_by_side, split_heads, zeros
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import KeyGates, Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.GroupedConfig):
    """Kimi Delta Attention. v_head_dim is also the middle width of the low-rank gates.

    lower_bound: 0 for the softplus decay gate; below 0 (FLA's safe gate has -5) the log decay stays above it.
    decay_rank: middle width of the decay's matrices; 0 is v_head_dim, -1 one full-rank matrix (Ling 3).
    output_gate_rank: middle width of the output gate; 0 is v_head_dim, -1 one full-rank matrix (Kimi K3).
    output_gate_bias: bias of the output gate's second matrix (FLA has it, Kimi's released weights do not).
    """

    lower_bound: Annotated[float, Limits(-1e9, 0)] = 0.0
    decay_rank: Annotated[int, Limits(-1, INT32)] = 0
    output_gate: OutputGate = "sigmoid"
    output_gate_rank: Annotated[int, Limits(-1, INT32)] = 0
    output_gate_bias: bool = True

    def explicit(self, d_model: int) -> "Config":
        explicit = super().explicit(d_model)
        assert isinstance(explicit, Config)
        same_rank = self.output_gate_rank == explicit.v_head_dim
        rank = 0 if same_rank or self.output_gate == "none" else self.output_gate_rank
        has_bias = self.output_gate != "none" and rank >= 0
        bias = self.output_gate_bias if has_bias else Config.output_gate_bias
        decay = 0 if self.decay_rank == explicit.v_head_dim else self.decay_rank
        return dataclasses.replace(explicit, decay_rank=decay, output_gate_rank=rank, output_gate_bias=bias)

    @property
    def decay_matrices(self) -> tuple[str, ...]:
        return ("f_proj.kernel",) if self.decay_rank < 0 else ("f_a_proj.kernel", "f_b_proj.kernel")

    def near_attention(self) -> dict[str, float]:
        found = linear_mixer.near_none("b_proj.kernel") | {self.decay_matrices[-1]: 0.0}
        if bound := -self.lower_bound:
            found["dt_bias"] = -math.log(bound / min(linear_mixer.NEAR_NONE, bound / 2) - 1)
        return found

    def gates_of_keys(self) -> KeyGates | None:
        if self.lower_bound:
            return None
        return linear_mixer.softplus_of_keys(self.decay_matrices, "b_proj.kernel")


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    bound = fields.get("lower_bound", 0.0)
    if bool(bound) != fields.get("safe_gate", False):
        raise fields.refuse("safe_gate", f"must go together with lower_bound, which is {bound or None}")
    sizes = grouped(fields, heads=16, head_dim=128, expand_v=1.0)
    return sizes | {"lower_bound": bound, "norm_eps": eps}


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    bound = config.lower_bound
    return grouped_fields(config) | {"safe_gate": bool(bound), "lower_bound": bound or None}


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    pairs = [(f"{name}_{part}_proj", f"{name}_proj.{at}") for name in "fg" for at, part in enumerate("ab")]
    return [
        *linears("qkvob"),
        *(linear(ours, theirs) for ours, theirs in pairs),
        bias("g_b_proj", "g_proj.1"),
        *short_convs("qkv", "qkv", config.conv_size),
        norm("o_norm", "o_norm"),
        *(same(name, name, loose=True) for name in ("A_log", "dt_bias")),
    ]


def _kimi_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """Sizes stand in linear_attn_config (the released weights) or beside the others (transformers 5.23)."""
    nested = fields.sub("linear_attn_config") or Fields({})
    nested.ignore("full_attn_layers", "kda_layers")
    sizes = {"output_gate_bias": False, "norm_eps": eps}
    for ours, inner, outer, default in (
        ("num_heads", "num_heads", "linear_num_heads", 32),
        ("head_dim", "head_dim", "linear_head_dim", 128),
        ("conv_size", "short_conv_kernel_size", "linear_conv_kernel_dim", 4),
    ):
        sizes[ours] = nested.get(inner, fields.get(outer, default))
        if fields.get(outer, sizes[ours]) != sizes[ours]:
            raise fields.refuse(outer, f"contradicts linear_attn_config.{inner} = {sizes[ours]}")
    nested.finish()
    return sizes


def _kimi_write(config: Config, d_model: int) -> dict[str, Any]:
    sizes = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    return {"linear_attn_config": sizes | {"short_conv_kernel_size": config.conv_size}}


def _kimi_rules(config: Config, d_model: int) -> list[Rule]:
    names = [*"qkvob", "f_a", "f_b", "g_a", "g_b"]
    return [
        *(linear(f"{name}_proj", f"{name}_proj") for name in names),
        *short_convs("qkv", "qkv", config.conv_size),
        norm("o_norm", "o_norm"),
        same("dt_bias", "dt_bias", loose=True),
        reshaped("A_log", "A_log", lambda heads: (1, 1, heads, 1)),
    ]


def _ling_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """head_dim is these layers' unless linear_head_dim stands beside it, as where transformers wrote both."""
    fields.only("no_kda_lora", True)
    fields.only("linear_attention", "kda")
    safe, bound = fields.get("kda_safe_gate", True), fields.get("kda_lower_bound", -5.0)
    if safe and bound >= 0:
        raise fields.refuse("kda_lower_bound", "must be below 0, or kda_safe_gate false")
    heads, width = fields.size("num_attention_heads", default=32), fields.size("head_dim", default=128)
    taps = fields.size("short_conv_kernel_size", default=4)
    return {
        "num_heads": fields.size("linear_num_heads", default=heads),
        "head_dim": fields.size("linear_head_dim", default=width),
        "conv_size": fields.size("linear_conv_kernel_dim", default=taps),
        "lower_bound": bound if safe else 0.0,
        "decay_rank": -1,
        "output_gate_rank": -1,
        "norm_eps": eps,
    }


def _ling_write(config: Config, d_model: int) -> dict[str, Any]:
    sizes = {"linear_num_heads": config.num_heads, "linear_head_dim": config.head_dim}
    taps = dict.fromkeys(("linear_conv_kernel_dim", "short_conv_kernel_size"), config.conv_size)
    gate = {"kda_safe_gate": config.lower_bound < 0, "kda_lower_bound": config.lower_bound or -5.0}
    return sizes | taps | gate | {"head_dim": config.head_dim}


def _ling_rules(config: Config, d_model: int) -> list[Rule]:
    return [
        *linears("qkvbfg"),
        linear("o_proj", "dense"),
        *short_convs("qkv", "qkv", config.conv_size),
        norm("o_norm", "o_norm"),
        *(same(name, name, loose=True) for name in ("A_log", "dt_bias")),
    ]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {
        "bailing_hybrid": Format(_ling_read, _ling_write, _ling_rules, "attention.", "linear_attention"),
        "fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "kda", "KDA"),
        "kimi_linear": Format(_kimi_read, _kimi_write, _kimi_rules, "self_attn.", "linear_attention"),
    }
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, heads = site.d_model, config.heads(site.d_model)
        super().__init__(
            config,
            site,
            rngs=rngs,
            gate_rank=max(config.output_gate_rank or heads.value, 0),
            gate_bias=config.output_gate_bias,
        )
        self.neg_eigval, self.lower_bound = config.neg_eigval, config.lower_bound
        decay_width = heads.num_v * heads.key
        self.decay_rank = max(config.decay_rank or heads.value, 0)
        if rank := self.decay_rank:
            self.f_a_proj = Linear(d_model, rank, rngs=rngs, axes=("embed", None))
            self.f_b_proj = Linear(rank, decay_width, rngs=rngs, axes=(None, "heads"))
        else:
            self.f_proj = Linear(d_model, decay_width, rngs=rngs)
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)
        A_log_init = zeros if config.lower_bound else linear_mixer.log_uniform(1, 16)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), A_log_init, decay=False)
        self.dt_bias = param(rngs, (decay_width,), ("heads",), linear_mixer.dt_bias_init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        gated = self.output_gate != "none" and self.gate_rank
        low = [self.f_a_proj] if self.decay_rank else []
        narrow = [*low, self.b_proj, *([self.g_a_proj] if gated else [])]
        made = side_by_side(x_BTD, narrow)
        f_BTF = self.f_b_proj(made[0]) if low else self.f_proj(x_BTD)
        f_BTHK = split_heads(f_BTF, self.heads.key)
        dt_bias_HK = split_heads(self.dt_bias[...], self.heads.key)
        log_decay_BTHK = channel_decay(f_BTHK, self.A_log[...], dt_bias_HK, self.lower_bound)
        beta = linear_mixer.write_strength(made[len(low)], self.neg_eigval)
        return Inputs(q, k, v, log_decay_BTHK, beta, gate=made[-1] if gated else None)


def channel_decay(
    f_BTHK: jax.Array, A_log_H: jax.Array, dt_bias_HK: jax.Array, lower_bound: float
) -> jax.Array:
    """Log decay per key channel, float32 [B, T, HV, K], in either form of the module docstring."""
    A_log_H1 = A_log_H[:, None]
    if lower_bound:
        return lower_bound * jax.nn.sigmoid(jnp.exp(A_log_H1) * (f_BTHK.astype(jnp.float32) + dt_bias_HK))
    return linear_mixer.softplus_decay(f_BTHK, A_log_H1, dt_bias_HK)
