"""The oracle: one token at a time, in float32 or, for inputs of 64 bits, float64 (complex: twice that).

Slow, and its backward keeps one state per token; every other backend is held against it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.elementwise.call import Call


def elementwise_recurrence(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.elementwise_recurrence`; a `lax.scan` over the T axis."""

    def token(state: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        x, log_decay, starts = inputs
        if starts is not None:
            state = jnp.where(starts[:, None], 0, state)
        state = jnp.exp(log_decay.astype(state.dtype)) * state + x.astype(state.dtype)
        return state, state

    tokens = (call.x, call.log_decay, call.starts)
    state, h = jax.lax.scan(token, call.state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(h, 0, 1).astype(call.output_dtype), state
