"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464).

S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      one decay a_t and beta_t per value head
log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k, v = silu(conv(W x)),  q and k of unit length
"""

import dataclasses

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.layers import Linear, param
from hybridlm.linear_mixer import (
    OUTPUT_GATES,
    Heads,
    Inputs,
    LinearMixer,
    dt_bias_init,
    log_uniform,
    softplus_decay,
    write_strength,
)
from hybridlm.mixers import Cost, at_least, one_of, whole_heads
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """Gated DeltaNet.

    num_heads: key heads; 0 is 0.75 d_model / head_dim, with which the layer has 6 d_model^2 parameters.
    num_v_heads: value heads, a multiple of num_heads (neighbours share a key head); 0 is num_heads.
    head_dim: channels of q and k per head.
    v_head_dim: channels of v per value head; 0 is twice head_dim.
    conv_size: taps of the short convolutions on q, k, v; 0 for none.
    neg_eigval: beta in (0, 2) instead of (0, 1), for state tracking (2411.12537).
    output_gate: "swish", "sigmoid" or "none"; a full-rank projection.
    norm_eps: of the output norm.
    """

    num_heads: int = 0
    num_v_heads: int = 0
    head_dim: int = 256
    v_head_dim: int = 0
    conv_size: int = 4
    neg_eigval: bool = False
    output_gate: str = "swish"
    norm_eps: float = 1e-6

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or 3 * d_model // 4 // self.head_dim
        return Heads(num, self.num_v_heads or num, self.head_dim, self.v_head_dim or 2 * self.head_dim)

    def check(self, d_model: int) -> None:
        at_least(self, 1, "head_dim")
        at_least(self, 0, "num_heads", "num_v_heads", "v_head_dim", "conv_size", "norm_eps")
        one_of(self, "output_gate", list(OUTPUT_GATES))
        whole_heads(self, 3 * d_model // 4, self.head_dim)
        self.heads(d_model).check()


class Mixer(LinearMixer):
    qk_l2norm = True

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        heads = config.heads(d_model)
        super().__init__(
            d_model,
            heads,
            rngs=rngs,
            conv_size=config.conv_size,
            norm_eps=config.norm_eps,
            output_gate=config.output_gate,
        )
        self.neg_eigval = config.neg_eigval
        self.a_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), log_uniform(0, 16), decay=False)
        self.dt_bias = param(rngs, (heads.num_v,), ("heads",), dt_bias_init, decay=False)

    def inputs(
        self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, shared: jax.Array | None
    ) -> Inputs:
        log_decay_BTH = softplus_decay(self.a_proj(x_BTD), self.A_log[...], self.dt_bias[...])
        return Inputs(q, k, v, log_decay_BTH, write_strength(self.b_proj(x_BTD), self.neg_eigval))


def cost(config: Config, d_model: int) -> Cost:
    return linear_mixer.cost(config.heads(d_model), config.conv_size, delta=True)
