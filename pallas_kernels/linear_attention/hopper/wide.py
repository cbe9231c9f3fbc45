"""Heads that are wider than the kernels' own: cut in XLA into heads that the kernels take.

Slices of V never meet, so each may become a value head of its own, which shares q, k, decay and beta, as
grouped value heads share a key head. What does not depend on V (inverses, scores, scaled copies of q and k)
is then made once a slice, so only heads that nothing else takes are cut. An additive update with 256
channels is the sum of two with 128.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import table

SLICES = (128, 64)  # values that a head of the kernels may have


def slices(value_dim: int) -> int:
    """Value heads that a head of this many values can become; 0 if no slice divides it."""
    return next((value_dim // width for width in SLICES if value_dim % width == 0), 0)


def parts(call: Call) -> tuple[int, int]:
    """Into how many K and V of a head are cut. (1, 1): the kernels take it as it is.

    V stays whole where the kernels take it in slices themselves: with the delta rule (one decay per head:
    128 or 256 channels) or a decay per channel. But slices of 128 values are cut if they then are cut into
    pieces (pieces.py), which heads with K unlike V are not.
    """
    halves = 2 if call.beta is None and call.q.shape[3] > table.WIDEST_KEY else 1
    count, key_dim = slices(call.v.shape[3]), call.q.shape[3] // halves
    if key_dim > table.WIDEST_KEY:
        return 1, 1
    takes_slices = call.per_channel or (call.beta is not None and key_dim == table.WIDEST_KEY)
    cut_heads = call.v.shape[2] * halves * count
    keys = (*call.k.shape[:3], key_dim)
    values = (*call.v.shape[:2], cut_heads, call.v.shape[3] // count)
    in_pieces = count > 1 and table.forward(keys, values).pieces > 1
    return halves, count if in_pieces or not takes_slices else 1


def cut(call: Call) -> Call:
    """The same call with, by `parts`, more key heads and within each more value heads.

    Value heads go by key head, half, value head of the group and slice. Every half computes its own part of
    o.
    """
    halves, count = parts(call)
    batch, length, heads, key_dim = call.q.shape
    group, value_dim = call.group, call.v.shape[3]
    value_heads = heads * halves * group * count

    def keys(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, heads * halves, key_dim // halves)

    def per_head(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = x.astype(jnp.float32).reshape(batch, length, heads, 1, group, 1)
        x = jnp.broadcast_to(x, (batch, length, heads, halves, group, count))
        return x.reshape(batch, length, value_heads)

    def per_key_channel(x: jax.Array) -> jax.Array:
        dtype, x = x.dtype, x.astype(jnp.float32)  # in which gradients of the slices are added up
        x = jnp.swapaxes(x.reshape(batch, length, heads, group, halves, 1, key_dim // halves), 3, 4)
        x = jnp.broadcast_to(x, (*x.shape[:5], count, key_dim // halves)).astype(dtype)
        return x.reshape(batch, length, value_heads, key_dim // halves)

    v = call.v.reshape(batch, length, heads, 1, group * value_dim)
    v = jnp.broadcast_to(v, (batch, length, heads, halves, group * value_dim))
    state = call.initial_state
    if state is not None:
        state = state.reshape(batch, heads, group, halves, key_dim // halves, count, value_dim // count)
        state = state.transpose(0, 1, 3, 2, 5, 4, 6)
        state = state.reshape(batch, value_heads, key_dim // halves, value_dim // count)
    decay = call.log_decay
    return dataclasses.replace(
        call,
        q=keys(call.q),
        k=keys(call.k),
        v=v.reshape(batch, length, value_heads, value_dim // count),
        log_decay=per_key_channel(decay) if decay is not None and call.per_channel else per_head(decay),
        beta=per_head(call.beta),
        initial_state=state,
    )


def join(o: jax.Array, final: jax.Array | None, call: Call) -> tuple[jax.Array, jax.Array | None]:
    """Undoes `cut` for the results; call: before it was cut."""
    halves, count = parts(call)
    batch, heads, group = call.v.shape[0], call.q.shape[2], call.group
    if halves > 1:
        by_half = o.reshape(*call.v.shape[:2], heads, halves, -1)
        o = by_half.astype(jnp.float32).sum(3).astype(o.dtype)
    if final is not None:
        final = final.reshape(batch, heads, halves, group, count, *final.shape[2:])
        final = final.transpose(0, 1, 3, 2, 5, 4, 6)
        final = final.reshape(batch, heads * group, call.q.shape[3], call.v.shape[3])
    return o.reshape(call.v.shape), final
