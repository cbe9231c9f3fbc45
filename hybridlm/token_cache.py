"""What softmax attention keeps of past tokens, appended to as decoding goes on.

On devices of `mesh.context` a cache without a window is cut along its slots: each device appends what falls
into its own, and queries, which are few, visit all of them (arXiv 2411.01783 has this as pass-Q).

Shape legend: B batch, T queries, S keys, H heads, G key/value heads, K and V their dims.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import pieces, sharding
from hybridlm.rows import Rows
from hybridlm.sharding import per_shard
from pallas_kernels.softmax_attention import blockwise, over_slots


class TokenCache(NamedTuple):
    """What attention keeps of past tokens.

    tokens: pytree of [B, size, ...]. Token n is in slot n; with a window, of which only ``size`` tokens are
        kept, in slot n % size.
    length: int32 [], tokens appended so far, the same for all rows.
    """

    tokens: Any
    length: jax.Array


def slots(tokens: int) -> int:
    """Slots of a cache for ``tokens`` tokens: as many on each device of `mesh.context`.

    Many are 65 to 128 times a power of two there, or XLA, which splits the sum over a long cache, copies it
    at every step into whole parts (docs/eval.md, decoding).
    """
    parts = sharding.parts("time")
    each = -(-tokens // parts)
    whole = 1 if each <= 65536 else 1 << (each - 1).bit_length() - 7
    return parts * whole * -(-each // whole)


def packed_indices(rows: Rows, start: jax.Array | int, window: int) -> tuple[jax.Array, jax.Array]:
    """(index_T, first_BT) of tokens whose first is at place ``start`` of the row."""
    index_T = start + jnp.arange(rows.positions.shape[1], dtype=jnp.int32)
    first_BT = index_T - rows.positions
    return index_T, jnp.maximum(first_BT, index_T - window + 1) if window else first_BT


class Held(NamedTuple):
    """Tokens that a layer attends to, which it may leave to others.

    tokens: pytree of [B, S, ...].
    start: int32 [], place in the row of the first query; None without a cache: S is T, and so are the places.
    index_S: the places of ``tokens``; None where each is in the slot of its place.
    first: of a window that keeps a document's first tokens (`hybridlm.first_tokens`), with a cache: see
        `pallas_kernels.softmax_attention.blockwise`.
    """

    tokens: Any
    start: jax.Array | None = None
    index_S: jax.Array | None = None
    first: tuple[jax.Array, jax.Array, jax.Array] | None = None


def hold(cache: TokenCache | None, tokens: Any, window: int) -> tuple[TokenCache | None, Held]:
    """(the cache with ``tokens``, a pytree of [B, T, ...], appended, what to attend to).

    The caller keeps the total within the size; only a cache with a window may wrap.
    """
    if cache is None:
        return None, Held(tokens)
    count = jax.tree.leaves(tokens)[0].shape[1]
    size = jax.tree.leaves(cache.tokens)[0].shape[1]
    length = cache.length + count
    if not window:
        write = lambda old, new: _written(old, new.astype(old.dtype), cache.length)
        kept = jax.tree.map(write, cache.tokens, tokens)
        return TokenCache(kept, length), Held(kept, cache.length)
    slots = jnp.arange(size, dtype=jnp.int32)
    newest = length - 1 - (length - 1 - slots) % size  # the token that each slot holds afterwards
    held = cache.length - 1 - (cache.length - 1 - slots) % size  # and held before; negative: empty
    is_new, source = newest >= cache.length, jnp.maximum(newest - cache.length, 0)
    everything = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache.tokens, tokens
    )
    taken = jnp.where(is_new, size + source, slots)
    kept = jax.tree.map(lambda x: jnp.take(x, taken, axis=1), everything)
    index_S = jnp.concatenate([held, cache.length + jnp.arange(count, dtype=jnp.int32)])
    return TokenCache(kept, length), Held(everything, cache.length, index_S)


def attend_held(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, held: Held, rows: Rows, *,
    scale: float, window: int = 0, sinks: jax.Array | None = None, forgotten: Sequence[jax.Array] = (),
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V] of the tokens that were appended last, over keys and values made of ``held`` tokens.

    forgotten: of queries and of keys, see `pallas_kernels.softmax_attention.blockwise`, or neither.
    """
    assert held.start is not None  # there is a cache
    size, in_order = k_BSGK.shape[1], held.index_S is None
    over = pieces.over(size) if in_order else None
    index_S = jnp.arange(size, dtype=jnp.int32) if in_order else held.index_S
    index_T, first_BT = packed_indices(rows, held.start, window)

    def op(q: jax.Array, k: jax.Array, v: jax.Array, *arrays: Any) -> tuple[jax.Array]:
        *places, sinks, now, then = arrays
        extras: dict[str, Any] = dict(scale=scale, sinks_H=sinks, forgotten_BTH=now, forgotten_BSH=then)
        # A single token's sum over a cache is split by XLA itself, on one device.
        if in_order and (over or q.shape[1] > 1):
            return (over_slots(q, k, v, *places, **extras, axis=over),)
        return (blockwise(q, k, v, *places, **extras, first=held.first),)

    now, then = forgotten or (None, None)
    arrays = q_BTHK, k_BSGK, v_BSGV, index_T, first_BT, index_S, sinks, now, then
    if over is None:
        return op(*arrays)[0]
    group = None if k_BSGK.shape[2] == 1 else "heads"
    queries, keys = ("batch", None, "heads", None), ("batch", "time", group, None)
    places = (None,), queries[:2], ("time",)
    extras = ("heads",), queries[:3], ("batch", "time", "heads")
    given = (None if x is None else axes for axes, x in zip(extras, arrays[6:], strict=True))
    return per_shard(op, (queries, keys, keys, *places, *given), (queries,))(*arrays)[0]


def _written(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """``old`` [B, S, ...] with ``new`` [B, T, ...] from slot ``start`` on."""
    if pieces.over(old.shape[1]) is None:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, 1)

    def op(old: jax.Array, new: jax.Array, start: jax.Array) -> tuple[jax.Array]:
        size, count = old.shape[1], new.shape[1]
        some = min(size, count)  # slots of this device that hold all that is new and falls into them
        offset = start - jax.lax.axis_index("context") * size  # of the new tokens from this device's slots
        at = jnp.clip(offset, 0, size - some)
        source = at - offset + jnp.arange(some, dtype=jnp.int32)
        is_new = ((source >= 0) & (source < count)).reshape(-1, *[1] * (old.ndim - 2))
        there = jax.lax.dynamic_slice_in_dim(old, at, some, axis=1)
        mixed = jnp.where(is_new, jnp.take(new, source, axis=1, mode="clip"), there)
        return (jax.lax.dynamic_update_slice_in_dim(old, mixed, at, axis=1),)

    rest = ("kv_heads", None) if old.ndim == 4 else (None,)
    cut = ("batch", "time", *rest)
    return per_shard(op, (cut, ("batch", None, *rest), ()), (cut,))(old, new, start)[0]
