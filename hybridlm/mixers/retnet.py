"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621).

S_t = a_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)             fixed a_h = 1 - 2^(-5-h) of head h
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k linear and rotated (RoPE), v linear
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, gated_fields, multi_head, only_plain
from hybridlm.convert.rules import Rule, short_convs
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Positive, Theta
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import Site
from hybridlm.mixers.gla import ALIASES, output_rules
from hybridlm.rotary import rotate


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """Multi-scale retention. The papers pair its wide values with a narrower MLP.

    conv_size: the paper has no convolutions.
    rope_theta: base of the rotary frequencies of q and k, whose head_dim must be even; 0 for no rotation.
    """

    v_expansion: ClassVar[int] = 2

    head_dim: Positive = 256
    conv_size: Count = 0
    rope_theta: Theta = 10000.0
    output_gate: OutputGate = "swish"

    def check(self, d_model: int) -> None:
        if self.rope_theta and self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even to be rotated", "Or set rope_theta=0.")
        super().check(d_model)


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.ignore("use_short_conv", "conv_size")  # fla's model does not hand them to its layer
    sizes = multi_head(fields, d_model, heads=8, expand_k=1.0, expand_v=2.0)
    only_plain(fields, sizes["num_heads"])
    gate = "swish" if fields.get("use_output_gate", True) else "none"
    return sizes | {"output_gate": gate, "norm_eps": eps}


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    return [*output_rules(config.output_gate != "none"), *short_convs("qkv", "qkv", config.conv_size)]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {
        "fla": Format(_fla_read, gated_fields, _fla_rules, "attn.", "retnet", "RetNet", aliases=ALIASES)
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.silu = config.conv_size > 0
        self.rope_theta = config.rope_theta

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        if self.rope_theta:
            q, k = (rotate(x, context.rows.positions, self.rope_theta) for x in (q, k))
        log_decay_H = np.log1p(-(2.0 ** (-5 - np.arange(self.heads.num)))).astype(np.float32)
        return Inputs(q, k, v, jnp.broadcast_to(log_decay_H, v.shape[:3]))
