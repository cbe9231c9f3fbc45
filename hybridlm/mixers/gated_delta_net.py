"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464).

S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      one decay a_t and beta_t per value head
log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k, v = silu(conv(W x)),  q and k of unit length
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert import rules
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, grouped, grouped_fields, linears, told
from hybridlm.convert.rules import Rule
from hybridlm.fields import Positive
from hybridlm.layers import Linear, param
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import KeyGates, Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.GroupedConfig):
    """Gated DeltaNet. With num_heads = 0 its keys take 0.75 d_model, and the layer 6 d_model^2 parameters."""

    v_expansion: ClassVar[int] = 2

    head_dim: Positive = 256
    output_gate: OutputGate = "swish"

    def key_width(self, d_model: int) -> int:
        return 3 * d_model // 4

    def near_attention(self) -> dict[str, float]:
        return linear_mixer.near_none("b_proj.kernel") | {"a_proj.kernel": 0.0}

    def gates_of_keys(self) -> KeyGates:
        return linear_mixer.softplus_of_keys(("a_proj.kernel",), "b_proj.kernel")


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("output_gate_activation", "swish", "silu", "sigmoid")
    gate = "sigmoid" if fields.get("output_gate_activation") == "sigmoid" else "swish"
    sizes = grouped(fields, heads=6, head_dim=256, expand_v=2.0)
    return sizes | {"output_gate": gate if fields.get("use_gate", True) else "none", "norm_eps": eps}


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    return grouped_fields(config) | {
        "use_gate": config.output_gate != "none",
        "output_gate_activation": "sigmoid" if config.output_gate == "sigmoid" else "swish",
    }


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    gate = "g" if config.output_gate != "none" else ""
    found = [*linears(f"qkvoab{gate}"), *rules.short_convs("qkv", "qkv", config.conv_size)]
    return [*found, rules.norm("o_norm", "o_norm"), *_decay(loose=True)]


def _decay(loose: bool = False) -> list[Rule]:
    return [rules.same(name, name, loose=loose) for name in ("A_log", "dt_bias")]


def _hf(heads: int, num_v: int, key: int, value: int) -> dict[str, tuple[str, int]]:
    """Fields of transformers' models, whose defaults differ."""
    return {
        "num_heads": ("linear_num_key_heads", heads),
        "num_v_heads": ("linear_num_value_heads", num_v),
        "head_dim": ("linear_key_head_dim", key),
        "v_head_dim": ("linear_value_head_dim", value),
        "conv_size": ("linear_conv_kernel_dim", 4),
    }


QWEN = _hf(16, 32, 128, 128)


def _hf_write(config: Config, d_model: int) -> dict[str, Any]:
    return told(config, QWEN)


def _qwen_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return fields.table(QWEN) | {"norm_eps": eps}


def _qwen_rules(config: Config, d_model: int) -> list[Rule]:
    heads = config.heads(d_model)
    widths = (heads.key_width, heads.key_width, heads.value_width)
    return [
        rules.concatenated([f"{name}_conv" for name in "qkv"], widths, "conv1d", rules.conv),
        rules.norm("o_norm", "norm"),
        rules.linear("o_proj", "out_proj"),
        *_decay(),
    ]


def _qwen3_next_rules(config: Config, d_model: int) -> list[Rule]:
    """Projections are fused by key head, with the value heads that share it."""
    heads = config.heads(d_model)
    share = heads.num_v // heads.num
    qkvz, value = [f"{name}_proj" for name in "qkvg"], share * heads.value
    return [
        *_qwen_rules(config, d_model),
        rules.interleaved(qkvz, (heads.key, heads.key, value, value), "in_proj_qkvz"),
        rules.interleaved(("b_proj", "a_proj"), (share, share), "in_proj_ba"),
    ]


def _qwen3_5_rules(config: Config, d_model: int) -> list[Rule]:
    heads = config.heads(d_model)
    widths = (heads.key_width, heads.key_width, heads.value_width)
    return [
        *_qwen_rules(config, d_model),
        rules.concatenated([f"{name}_proj" for name in "qkv"], widths, "in_proj_qkv", rules.linear),
        *(
            rules.linear(f"{ours}_proj", f"in_proj_{theirs}")
            for ours, theirs in zip("gba", "zba", strict=True)
        ),
    ]


OLMO_NORM_EPS = 1e-5  # hard-coded there


def _olmo_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("linear_use_gate", True)
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):
        fields.ignore(f"linear_{name}")
    heads = fields.size("num_attention_heads")
    linear_heads = fields.size("linear_num_key_heads", default=heads)
    key = fields.get("linear_key_head_dim", int(0.75 * d_model / linear_heads))
    sizes = fields.table(_hf(heads, heads, key, 2 * key))
    return sizes | {"norm_eps": OLMO_NORM_EPS, "neg_eigval": fields.get("linear_allow_neg_eigval", True)}


def _olmo_write(config: Config, d_model: int) -> dict[str, Any]:
    return _hf_write(config, d_model) | {"linear_allow_neg_eigval": config.neg_eigval}


def _olmo_rules(config: Config, d_model: int) -> list[Rule]:
    """The convolutions are one at run time there, which transformers 5.23 saves cut into equal parts."""
    joined = rules.convs([f"{name}_conv" for name in "qkv"], [f"{name}_conv1d" for name in "qkv"])
    return [*linears("qkvoabg"), joined, rules.norm("o_norm", "o_norm"), *_decay()]


LINEAR = ("linear_attn.", "linear_attention")


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {
        "fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "gated_deltanet", "GatedDeltaNet"),
        "qwen3_next": Format(_qwen_read, _hf_write, _qwen3_next_rules, *LINEAR),
        "qwen3_5": Format(_qwen_read, _hf_write, _qwen3_5_rules, *LINEAR),
        "qwen3_5_moe": Format(_qwen_read, _hf_write, _qwen3_5_rules, *LINEAR),
        "olmo_hybrid": Format(_olmo_read, _olmo_write, _olmo_rules, *LINEAR),
    }
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        d_model = site.d_model
        heads, self.neg_eigval = self.heads, config.neg_eigval
        self.a_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), linear_mixer.log_uniform(0, 16), decay=False)
        self.dt_bias = param(rngs, (heads.num_v,), ("heads",), linear_mixer.dt_bias_init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        log_decay_BTH = linear_mixer.softplus_decay(self.a_proj(x_BTD), self.A_log[...], self.dt_bias[...])
        return Inputs(
            q, k, v, log_decay_BTH, linear_mixer.write_strength(self.b_proj(x_BTD), self.neg_eigval)
        )
