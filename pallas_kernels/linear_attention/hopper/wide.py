"""Heads that are wider than the kernels' own: cut in XLA into heads that the kernels take.

Slices of V never meet, so each becomes a value head of its own, which shares q, k, decay and beta, as grouped
value heads share a key head. An additive update with 256 channels is the sum of two with 128. The delta rule is
cut only where `whole` says so: its inverse would be computed once a slice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import table

SLICES = (128, 64)  # values that a head of the kernels may have


def slices(value_dim: int) -> int:
    """Value heads that a head of this many values becomes; 0 if no slice divides it."""
    return next((value_dim // width for width in SLICES if value_dim % width == 0), 0)


def halves(call: Call) -> int:
    """Key heads that a head's channels become."""
    return 2 if call.beta is None and call.q.shape[3] > table.WIDEST_KEY else 1


def per_channel(call: Call) -> bool:
    """Whether the log-decay is per key channel."""
    return call.log_decay is not None and call.log_decay.ndim == 4


def whole(call: Call) -> bool:
    """Whether the kernels take the heads as they are.

    The delta rule's with 128 or 256 channels, unless slices of 128 values could be cut into pieces (pieces.py),
    which heads with K unlike V are not.
    """
    count, (*_, heads, value_dim) = slices(call.v.shape[3]), call.v.shape
    if count == 1 and halves(call) == 1:
        return True
    if call.beta is None or per_channel(call) or call.q.shape[3] < table.WIDEST_KEY:
        return False
    sliced = (*call.v.shape[:2], heads * count, value_dim // count)
    return call.q.shape[3] > table.WIDEST_KEY or table.forward(call.k.shape, sliced).pieces == 1


def cut(call: Call) -> Call:
    """The same call with `halves` times the key heads and, within each, `slices` times the value heads.

    Value heads go by key head, half, value head of the group and slice. Every half computes its own part of o.
    """
    count, parts = slices(call.v.shape[3]), halves(call)
    batch, length, heads, key_dim = call.q.shape
    group, value_dim = call.group, call.v.shape[3]
    value_heads = heads * parts * group * count

    def keys(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, heads * parts, key_dim // parts)

    def per_head(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = jnp.broadcast_to(
            x.reshape(batch, length, heads, 1, group, 1), (batch, length, heads, parts, group, count)
        )
        return x.astype(jnp.float32).reshape(batch, length, value_heads)

    def per_key_channel(x: jax.Array) -> jax.Array:
        dtype, x = x.dtype, x.astype(jnp.float32)  # in which gradients of the slices are added up
        x = jnp.swapaxes(x.reshape(batch, length, heads, group, parts, 1, key_dim // parts), 3, 4)
        x = jnp.broadcast_to(x, (*x.shape[:5], count, key_dim // parts)).astype(dtype)
        return x.reshape(batch, length, value_heads, key_dim // parts)

    v = jnp.broadcast_to(
        call.v.reshape(batch, length, heads, 1, group * value_dim),
        (batch, length, heads, parts, group * value_dim),
    )
    state = call.initial_state
    if state is not None:
        state = state.reshape(batch, heads, group, parts, key_dim // parts, count, value_dim // count)
        state = state.transpose(0, 1, 3, 2, 5, 4, 6)
        state = state.reshape(batch, value_heads, key_dim // parts, value_dim // count)
    decay = call.log_decay
    return dataclasses.replace(
        call,
        q=keys(call.q),
        k=keys(call.k),
        v=v.reshape(batch, length, value_heads, value_dim // count),
        log_decay=per_key_channel(decay) if decay is not None and per_channel(call) else per_head(decay),
        beta=per_head(call.beta),
        initial_state=state,
    )


def join(o: jax.Array, final: jax.Array | None, call: Call) -> tuple[jax.Array, jax.Array | None]:
    """Undoes `cut` for the results; call: before it was cut."""
    count, parts = slices(call.v.shape[3]), halves(call)
    batch, heads, group = call.v.shape[0], call.q.shape[2], call.group
    if parts > 1:
        by_half = o.reshape(*call.v.shape[:2], heads, parts, -1)
        o = by_half.astype(jnp.float32).sum(3).astype(o.dtype)
    if final is not None:
        final = final.reshape(batch, heads, parts, group, count, *final.shape[2:])
        final = final.transpose(0, 1, 3, 2, 5, 4, 6)
        final = final.reshape(batch, heads * group, call.q.shape[3], call.v.shape[3])
    return o.reshape(call.v.shape), final
