"""DeltaNet (Yang et al. 2024, arXiv 2406.06484).

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        beta_t = sigmoid(W_b x_t)
o_t = S_t^T q_t / sqrt(K),   q, k, v = silu(conv(W x)),  q and k of unit length;   y = W_o rmsnorm(o)
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, conv_size, linears, multi_head, multi_head_fields
from hybridlm.convert.rules import Rule, norm, short_convs
from hybridlm.layers import Linear
from hybridlm.linear_mixer import Inputs, LinearMixer, write_strength
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """DeltaNet.

    neg_eigval: beta in (0, 2) instead of (0, 1), for state tracking (2411.12537).
    """

    delta: ClassVar[bool] = True

    neg_eigval: bool = False

    def near_attention(self) -> dict[str, float]:
        return {"b_proj.kernel": 0.0}


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    for field, supported in (("qk_norm", "l2"), ("qk_activation", "silu"), ("use_beta", True)):
        fields.only(field, supported)
    fields.only("use_output_norm", True)
    return {
        **multi_head(fields, d_model, heads=16, expand_k=1.0, expand_v=1.0),
        "conv_size": conv_size(fields, True),
        "neg_eigval": fields.get("allow_neg_eigval", False),
        "output_gate": "swish" if fields.get("use_gate", False) else "none",
        "norm_eps": eps,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    said = {"use_gate": config.output_gate == "swish", "allow_neg_eigval": config.neg_eigval}
    return multi_head_fields(config, d_model) | said


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    gate = "g" if config.output_gate != "none" else ""
    return [*linears(f"qkvob{gate}"), *short_convs("qkv", "qkv", config.conv_size), norm("o_norm", "o_norm")]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {"fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "delta_net", "DeltaNet")}
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.neg_eigval = config.neg_eigval
        self.b_proj = Linear(site.d_model, self.heads.num_v, rngs=rngs)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        return Inputs(q, k, v, beta=write_strength(self.b_proj(x_BTD), self.neg_eigval))
