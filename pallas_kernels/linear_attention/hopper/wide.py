"""Heads with more than 128 values: slices of V never meet, so each becomes a value head of its own.

The slices of a head share its q, k, decay and beta, as grouped value heads share a key head. With the delta
rule the inverse of a chunk is computed once a slice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import Call

SLICES = (128, 64)  # values that a head of the kernels may have


def slices(value_dim: int) -> int:
    """Value heads that a head of this many values becomes; 0 if no slice divides it."""
    return next((value_dim // width for width in SLICES if value_dim % width == 0), 0)


def cut(call: Call) -> Call:
    """The same call with `slices` times the value heads, slices of a head in order."""
    count = slices(call.v.shape[3])
    batch, length, heads, value_dim = call.v.shape

    def repeat(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.repeat(x.astype(jnp.float32), count, axis=2)

    state = call.initial_state
    if state is not None:
        state = state.reshape(batch, heads, -1, count, value_dim // count)
        state = jnp.swapaxes(state, 2, 3).reshape(batch, heads * count, -1, value_dim // count)
    return dataclasses.replace(
        call,
        v=call.v.reshape(batch, length, heads * count, -1),
        log_decay=repeat(call.log_decay),
        beta=repeat(call.beta),
        initial_state=state,
    )


def join(o: jax.Array, final: jax.Array | None, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """Undoes `cut` for the results; shape: of the v that was cut."""
    batch, _, heads, value_dim = shape
    if final is not None:
        _, slices, key_dim, width = final.shape
        final = final.reshape(batch, heads, slices // heads, key_dim, width)
        final = jnp.swapaxes(final, 2, 3).reshape(batch, heads, key_dim, value_dim)
    return o.reshape(shape), final
