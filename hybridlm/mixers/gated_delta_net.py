"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464).

S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      one decay a_t and beta_t per value head
log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k, v = silu(conv(W x)),  q and k of unit length
"""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.fields import Positive
from hybridlm.layers import Linear, param
from hybridlm.linear_mixer import (
    Inputs,
    LinearMixer,
    OutputGate,
    dt_bias_init,
    log_uniform,
    softplus_decay,
    write_strength,
)
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.GroupedConfig):
    """Gated DeltaNet. With num_heads = 0 its keys take 0.75 d_model, and the layer 6 d_model^2 parameters."""

    v_expansion: ClassVar[int] = 2

    head_dim: Positive = 256
    output_gate: OutputGate = "swish"

    def key_width(self, d_model: int) -> int:
        return 3 * d_model // 4


class Mixer(LinearMixer):
    config_class = Config
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        d_model = site.d_model
        heads, self.neg_eigval = self.heads, config.neg_eigval
        self.a_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), log_uniform(0, 16), decay=False)
        self.dt_bias = param(rngs, (heads.num_v,), ("heads",), dt_bias_init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        log_decay_BTH = softplus_decay(self.a_proj(x_BTD), self.A_log[...], self.dt_bias[...])
        return Inputs(q, k, v, log_decay_BTH, write_strength(self.b_proj(x_BTD), self.neg_eigval))
