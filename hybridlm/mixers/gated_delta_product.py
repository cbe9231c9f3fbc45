"""Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297): Gated DeltaNet with several Householder steps.

S_{t,0} = a_t S_{t-1,n}, one decay a token, then the n steps of `delta_product`; else as `gated_delta_net`.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from hybridlm.fields import Positive
from hybridlm.layers import Linear
from hybridlm.linear_mixer import Inputs
from hybridlm.mixers import Site, gated_delta_net
from hybridlm.mixers.delta_product import product
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config(gated_delta_net.Config):
    """Gated DeltaProduct. Heads are half as wide as Gated DeltaNet's (and FLA's): the kernels take them.

    num_householder: steps a token, each with its own k, v and beta.
    """

    head_dim: Positive = 128
    num_householder: Positive = 2
    neg_eigval: bool = True

    @property
    def writes(self) -> int:
        return self.num_householder


class Mixer(gated_delta_net.Mixer):
    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.b_proj = Linear(site.d_model, self.writes * self.heads.num_v, rngs=rngs)

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        return product(inputs, self.writes, rows, state, qk_l2norm=self.qk_l2norm)
