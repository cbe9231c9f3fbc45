"""DeltaNet (Yang et al. 2024, arXiv 2406.06484).

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        beta_t = sigmoid(W_b x_t)
o_t = S_t^T q_t / sqrt(K),   q, k, v = silu(conv(W x)),  q and k of unit length;   y = W_o rmsnorm(o)
"""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
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


class Mixer(LinearMixer):
    config_class = Config
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.neg_eigval = config.neg_eigval
        self.b_proj = Linear(site.d_model, self.heads.num_v, rngs=rngs)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        return Inputs(q, k, v, beta=write_strength(self.b_proj(x_BTD), self.neg_eigval))
