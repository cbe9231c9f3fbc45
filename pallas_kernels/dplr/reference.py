"""The oracle: the recurrence one token at a time, in float32 or, for float64 inputs, float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.dplr.call import Call


def dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.dplr`; a `lax.scan` over the T axis."""
    product = lambda spec, *xs: jnp.einsum(spec, *xs, precision=jax.lax.Precision.HIGHEST)

    def token(state: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        (q, k, v, a, b, g), starts = inputs
        q, k, v, a, b, g = (x.astype(state.dtype) for x in (q, k, v, a, b, g))
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], 0, state)
        read = product("bhk,bhkv->bhv", a, state)
        state = jnp.exp(g)[..., None] * state + b[..., None] * read[:, :, None] + k[..., None] * v[:, :, None]
        return state, product("bhk,bhkv->bhv", q * call.scale, state)

    tokens = (call.q, call.k, call.v, call.a, call.b, call.log_decay), call.starts
    state, o = jax.lax.scan(token, call.state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1).astype(call.v.dtype), state
