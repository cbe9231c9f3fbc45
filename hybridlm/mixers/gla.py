"""Gated Linear Attention (Yang et al. 2023, arXiv 2312.06635).

S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)       one decay per key channel
log a_t = logsigmoid(W_f2 W_f1 x_t + b) / 16
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k, v linear
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, conv_size, gated_fields, linears, multi_head, only_plain
from hybridlm.convert.rules import Rule, bias, linear, norm, short_convs
from hybridlm.errors import ConfigError
from hybridlm.fields import Above, Count, Positive
from hybridlm.layers import Linear, split_heads
from hybridlm.linear_mixer import NEAR_NONE, Heads, Inputs, LinearMixer, OutputGate, inverse_softplus
from hybridlm.mixers import KeyGates, Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """Gated Linear Attention.

    head_dim: 0 is d_model / 2 / num_heads.  v_head_dim: 0 is d_model / num_heads.
    conv_size: the paper has no convolutions.
    gate_rank: middle width of the decay gate.
    gate_normalizer: divides the log decay; larger forgets more slowly.
    """

    num_heads: Positive = 4
    head_dim: Count = 0
    conv_size: Count = 0
    gate_rank: Positive = 16
    gate_normalizer: Above = 16.0
    output_gate: OutputGate = "swish"

    def heads(self, d_model: int) -> Heads:
        key = self.head_dim or d_model // 2 // self.num_heads
        value = self.v_head_dim or d_model // self.num_heads
        return Heads(self.num_heads, self.num_heads, key, value)

    def check(self, d_model: int) -> None:
        if d_model % (2 * self.num_heads) and not (self.head_dim and self.v_head_dim):
            raise ConfigError(
                "num_heads",
                self.num_heads,
                f"twice it must divide d_model = {d_model} where head_dim or v_head_dim is 0",
            )
        super().check(d_model)

    def near_attention(self) -> dict[str, float]:
        bias = -inverse_softplus(NEAR_NONE * self.gate_normalizer)
        return {"f_b_proj.kernel": 0.0, "f_b_proj.bias": bias}

    def gates_of_keys(self) -> KeyGates:
        return KeyGates(("f_a_proj.kernel", "f_b_proj.kernel"), 1, {"f_b_proj.bias": 0.0})


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    sizes = multi_head(fields, d_model, heads=4, expand_k=0.5, expand_v=1.0)
    only_plain(fields, sizes["num_heads"])
    gate = "swish" if fields.get("use_output_gate", True) else "none"
    return sizes | {"output_gate": gate, "conv_size": conv_size(fields, False), "norm_eps": eps}


def output_rules(gated: bool) -> list[Rule]:
    """Of GLA and RetNet, whose norm is fused with the gate; with fuse_norm off it is called g_norm."""
    return [
        *linears("qkvog" if gated else "qkvo"),
        norm("o_norm", "g_norm_swish_gate" if gated else "g_norm"),
    ]


ALIASES = {".g_norm.": ".g_norm_swish_gate."}


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    return [
        *output_rules(config.output_gate != "none"),
        *short_convs("qkv", "qkv", config.conv_size),
        linear("f_a_proj", "gk_proj.0"),
        linear("f_b_proj", "gk_proj.1"),
        bias("f_b_proj", "gk_proj.1"),
    ]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {
        "fla": Format(_fla_read, gated_fields, _fla_rules, "attn.", "gla", "GLA", aliases=ALIASES)
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.silu = config.conv_size > 0
        self.gate_normalizer = config.gate_normalizer
        self.f_a_proj = Linear(site.d_model, config.gate_rank, rngs=rngs, axes=("embed", None))
        self.f_b_proj = Linear(
            config.gate_rank, self.heads.key_width, rngs=rngs, axes=(None, "heads"), bias=True
        )

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        f_BTHK = split_heads(self.f_b_proj(self.f_a_proj(x_BTD)), self.heads.key)
        return Inputs(q, k, v, jax.nn.log_sigmoid(f_BTHK.astype(jnp.float32)) / self.gate_normalizer)
