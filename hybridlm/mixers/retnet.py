"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621).

S_t = a_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)             fixed a_h = 1 - 2^(-5-h) of head h
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k linear and rotated (RoPE), v linear
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.errors import ConfigError
from hybridlm.layers import rotate
from hybridlm.linear_mixer import OUTPUT_GATES, Heads, Inputs, LinearMixer
from hybridlm.mixers import Cost, at_least, one_of, whole_heads
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """Multi-scale retention.

    num_heads: heads; 0 is d_model / head_dim.
    head_dim: channels of q and k per head, even.
    v_head_dim: channels of v per head; 0 is twice head_dim (the papers pair it with a narrower MLP).
    conv_size: taps of short convolutions with SiLU on q, k, v; 0 for none, as in the paper.
    rope_theta: base of the rotary frequencies; 0 for no rotation.
    output_gate: "swish", "sigmoid" or "none"; a full-rank projection.
    norm_eps: of the output norm.
    """

    num_heads: int = 0
    head_dim: int = 256
    v_head_dim: int = 0
    conv_size: int = 0
    rope_theta: float = 10000.0
    output_gate: str = "swish"
    norm_eps: float = 1e-6

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or d_model // self.head_dim
        return Heads(num, num, self.head_dim, self.v_head_dim or 2 * self.head_dim)

    def check(self, d_model: int) -> None:
        at_least(self, 1, "head_dim")
        at_least(self, 0, "num_heads", "v_head_dim", "conv_size", "rope_theta", "norm_eps")
        one_of(self, "output_gate", list(OUTPUT_GATES))
        if self.rope_theta and self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even to be rotated", "Or set rope_theta=0.")
        whole_heads(self, d_model, self.head_dim)
        self.heads(d_model).check()


class Mixer(LinearMixer):
    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(
            d_model,
            config.heads(d_model),
            rngs=rngs,
            conv_size=config.conv_size,
            norm_eps=config.norm_eps,
            output_gate=config.output_gate,
        )
        self.rope_theta = config.rope_theta

    def activate(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(x) if self.conv_size else x

    def inputs(
        self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, shared: jax.Array | None
    ) -> Inputs:
        if self.rope_theta:
            q, k = (rotate(x, rows.positions, self.rope_theta) for x in (q, k))
        log_decay_H = np.log1p(-(2.0 ** (-5 - np.arange(self.heads.num)))).astype(np.float32)
        return Inputs(q, k, v, jnp.broadcast_to(log_decay_H, v.shape[:3]))


def cost(config: Config, d_model: int) -> Cost:
    return linear_mixer.cost(config.heads(d_model), config.conv_size, delta=False)
