"""DeltaProduct (Siems et al. 2025, arXiv 2502.10297): DeltaNet with several Householder steps a token.

S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   j = 1 ... n
o_t = S_{t,n}^T q_t / sqrt(K),   S_{t,0} = S_{t-1,n}.   The rest as in `delta_net`. With beta up to 2
the product of two steps is any rotation of a plane.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, mixers
from hybridlm.fields import Positive
from hybridlm.layers import Linear
from hybridlm.linear_mixer import Inputs, LinearMixer, recurrence
from hybridlm.mixers import Site, delta_net
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Steps(mixers.Config):
    """What several steps a token add to the settings of a kind with one.

    num_householder: steps a token, each with its own k, v and beta.
    """

    num_householder: Positive = 2
    neg_eigval: bool = True

    @property
    def writes(self) -> int:
        return self.num_householder


@dataclasses.dataclass(frozen=True)
class Config(Steps, delta_net.Config):
    """DeltaProduct."""


class ProductMixer(LinearMixer):
    """To stand before the Mixer of the kind with one step."""

    def __init__(self, config: linear_mixer.Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.b_proj = Linear(site.d_model, self.writes * self.heads.num_v, rngs=rngs)

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        return product(inputs, self.writes, rows, state, qk_l2norm=self.qk_l2norm)


class Mixer(ProductMixer, delta_net.Mixer):
    config_class = Config


def product(
    inputs: Inputs, steps: int, rows: Rows, state: jax.Array | None, *, qk_l2norm: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The recurrence over ``steps`` times as many tokens: a token decays at its first, is read at its last.

    inputs: q [B, T, H, K] and log_decay as for one step; k, v, beta with steps * H heads, step by step.
    """
    batch, length, _, _ = inputs.q.shape
    split = lambda x: x.reshape(batch, length, steps, -1, *x.shape[3:])
    k, v, beta = (split(x) for x in (inputs.k, inputs.v, inputs.beta))
    if state is not None and length == 1:
        for step in range(steps):
            decay = None if step else inputs.log_decay
            one = Inputs(inputs.q, k[:, :, step], v[:, :, step], decay, beta[:, :, step])
            o, state = recurrence(one, rows, state, qk_l2norm=qk_l2norm)
            rows = rows._replace(positions=jnp.ones_like(rows.positions))  # the document has begun
        return o, state

    def alone(x: jax.Array, step: int) -> jax.Array:
        """``x`` at one step of each token, zeros at the others."""
        widths = [(0, 0), (0, 0), (step, steps - 1 - step)] + [(0, 0)] * (x.ndim - 2)
        return merge(jnp.pad(x[:, :, None], widths))

    merge = lambda x: x.reshape(batch, length * steps, *x.shape[3:])
    decay = None if inputs.log_decay is None else alone(inputs.log_decay, 0)
    many = Inputs(alone(inputs.q, steps - 1), merge(k), merge(v), decay, merge(beta))
    wide = Rows(*(jnp.repeat(x, steps, axis=1) for x in rows))
    o, state = recurrence(many, wide, state, qk_l2norm=qk_l2norm)
    return o[:, steps - 1 :: steps], state
