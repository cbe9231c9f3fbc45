"""The forget gate of HGRN and HGRN2: a sigmoid above a learned lower bound that rises with depth.

    f = lb + (1 - lb) sigmoid(x)        lb of layer l = sum of softmax(P)_i over layers 0 < i <= l
(HGRN, arXiv 2311.04823, section 3.2; FLA's parameterisation.)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.layers import param, zeros


class LowerBounds(nnx.Module):
    """P [num_layers, features], zeros: bounds rise evenly with depth, from 0 to 1 - 1 / num_layers.

    num_layers counts every layer of the stack, other kinds included. Without ``learned`` all bounds are 0.
    """

    def __init__(self, num_layers: int, features: int, learned: bool, *, rngs: nnx.Rngs):
        self.shape = (num_layers, features)
        self.lower_bounds = param(rngs, self.shape, (None, "heads"), zeros, decay=False) if learned else None

    def per_layer(self) -> jax.Array:
        """float32 [num_layers, features], each in [0, 1)."""
        return jnp.zeros(self.shape) if self.lower_bounds is None else cumulative(self.lower_bounds[...])


def cumulative(P_LF: jax.Array) -> jax.Array:
    share_LF = jax.nn.softmax(P_LF, axis=0)
    return jnp.cumsum(share_LF, axis=0) - share_LF[0]


def log_forget(x: jax.Array, lower_bound: jax.Array) -> jax.Array:
    """log f, float32, accurate where sigmoid(x) underflows and with finite gradients at a bound of 0."""
    log_sigmoid = jax.nn.log_sigmoid(x.astype(jnp.float32))
    bounded = lower_bound > 0
    lb = jnp.where(bounded, lower_bound, 0.5)
    return jnp.where(bounded, jnp.logaddexp(jnp.log(lb), jnp.log1p(-lb) + log_sigmoid), log_sigmoid)
