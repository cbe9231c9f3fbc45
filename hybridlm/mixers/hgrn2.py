"""HGRN2 (Qin et al. 2024, arXiv 2404.07904): GLA whose key is the complement of its decay.

S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T q_t / sqrt(K),   q = swish(W_q x), v = W_v x
f_t = lb + (1 - lb) sigmoid(W_k x_t),   y = W_o rmsnorm(o) with one norm over all heads, no gate
lb: a lower bound per channel that rises with depth, see `forget_gate`
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, conv_fields, conv_size
from hybridlm.convert.rules import Rule, linear, norm, short_convs
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Positive
from hybridlm.forget_gate import LowerBounds, log_forget
from hybridlm.layers import RMSNorm, merge_heads, split_heads
from hybridlm.linear_mixer import Heads, Inputs, LinearMixer
from hybridlm.mixers import Cost, Site, whole_heads
from hybridlm.mixers.hgrn import bounds

NORM_EPS = 1e-5  # FLA's layer ignores the model's norm_eps


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """HGRN2.

    num_heads: heads; 0 is d_model / head_dim.
    head_dim: state channels per head, the paper's expansion ratio.
    v_head_dim: value channels per head; 0 is d_model / num_heads.
    conv_size: taps of short convolutions on q, k (before the gate) and v; 0 for none, as in the paper.
    lower_bound: whether forget gates have the learned layer-wise lower bound.
    """

    num_heads: Count = 0
    head_dim: Positive = 128
    v_head_dim: Count = 0
    conv_size: Count = 0
    lower_bound: bool = True

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or d_model // self.head_dim
        return Heads(num, num, self.head_dim, self.v_head_dim or d_model // num)

    def check(self, d_model: int) -> None:
        whole_heads(self, d_model, self.head_dim)
        heads = self.heads(d_model)
        heads.check()
        if not self.v_head_dim and d_model % heads.num:
            raise ConfigError("num_heads", heads.num, f"must divide d_model = {d_model}")

    def cost(self, d_model: int, context: int) -> Cost:
        return linear_mixer.cost(self.heads(d_model), self.conv_size, delta=False)

    def explicit(self, d_model: int) -> "Config":
        heads = self.heads(d_model)
        return dataclasses.replace(self, num_heads=heads.num, v_head_dim=heads.value)


class Shared(LowerBounds):
    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(site.num_layers, config.heads(site.d_model).key_width, config.lower_bound, rngs=rngs)


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    if fields.values.get("expand_ratio", 128) is None:
        heads = fields.size("num_heads")
        ratio = fields.part("num_heads", d_model, heads)
    else:  # num_heads follows, whatever it says
        ratio = fields.size("expand_ratio", default=128)
        heads = d_model // ratio
    fields.ignore("num_heads", "expand_ratio")
    return {
        "num_heads": heads,
        "head_dim": ratio,
        "v_head_dim": fields.part("expand_ratio", d_model, heads),
        "conv_size": conv_size(fields, False),
        "lower_bound": fields.get("use_lower_bound", True),
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    said = {"num_heads": config.num_heads, "expand_ratio": config.head_dim}
    return said | {"use_lower_bound": config.lower_bound} | conv_fields(config.conv_size)


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    """Their f is k here, their i is v."""
    pairs = zip("qkvo", "qfio", strict=True)
    linears = [linear(f"{ours}_proj", f"{theirs}_proj") for ours, theirs in pairs]
    return [*linears, *short_convs("qkv", "qfi", config.conv_size), norm("o_norm", "g_norm")]


class Mixer(LinearMixer):
    config_class = Config
    shared_class = Shared
    public: ClassVar = {"fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "hgrn2", "HGRN2", bounds)}
    silu = False

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        heads = config.heads(site.d_model)
        common = linear_mixer.Config(heads.num, heads.key, heads.value, config.conv_size, norm_eps=NORM_EPS)
        super().__init__(common, site, rngs=rngs)
        self.k_proj.exact = True  # the decay is made of it
        self.o_norm = RMSNorm(heads.value_width, rngs=rngs, eps=NORM_EPS, axis="heads")

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        log_f_BTHK = log_forget(k, split_heads(context.shared, self.heads.key))
        return Inputs(jax.nn.silu(q), -jnp.expm1(log_f_BTHK).astype(k.dtype), v, log_f_BTHK)

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        return self.o_norm(merge_heads(o_BTHV))
