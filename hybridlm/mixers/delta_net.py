"""DeltaNet (Yang et al. 2024, arXiv 2406.06484).

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        beta_t = sigmoid(W_b x_t)
o_t = S_t^T q_t / sqrt(K),   q, k, v = silu(conv(W x)),  q and k of unit length;   y = W_o rmsnorm(o)
"""

import dataclasses

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.layers import Linear
from hybridlm.linear_mixer import OUTPUT_GATES, Heads, Inputs, LinearMixer, write_strength
from hybridlm.mixers import Cost, at_least, one_of, whole_heads
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """DeltaNet.

    num_heads: heads; 0 is d_model / head_dim.
    head_dim: channels of q and k per head.
    v_head_dim: channels of v per head; 0 is head_dim.
    conv_size: taps of the short convolutions on q, k, v; 0 for none.
    neg_eigval: beta in (0, 2) instead of (0, 1), for state tracking (2411.12537).
    output_gate: "none", "swish" or "sigmoid" of a full-rank projection.
    norm_eps: of the output norm.
    """

    num_heads: int = 0
    head_dim: int = 128
    v_head_dim: int = 0
    conv_size: int = 4
    neg_eigval: bool = False
    output_gate: str = "none"
    norm_eps: float = 1e-6

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or d_model // self.head_dim
        return Heads(num, num, self.head_dim, self.v_head_dim or self.head_dim)

    def check(self, d_model: int) -> None:
        at_least(self, 1, "head_dim")
        at_least(self, 0, "num_heads", "v_head_dim", "conv_size", "norm_eps")
        one_of(self, "output_gate", list(OUTPUT_GATES))
        whole_heads(self, d_model, self.head_dim)
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
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)

    def inputs(
        self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, shared: jax.Array | None
    ) -> Inputs:
        return Inputs(q, k, v, beta=write_strength(self.b_proj(x_BTD), self.neg_eigval))


def cost(config: Config, d_model: int) -> Cost:
    return linear_mixer.cost(config.heads(d_model), config.conv_size, delta=True)
