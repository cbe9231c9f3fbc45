"""What softmax attention keeps of past tokens, appended to as decoding goes on.

Shape legend: B batch, T queries, S keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows


class TokenCache(NamedTuple):
    """What attention keeps of past tokens.

    tokens: pytree of [B, size, ...]. Token n is in slot n; with a window, of which only ``size`` tokens are
        kept, in slot n % size.
    length: int32 [], tokens appended so far, the same for all rows.
    """

    tokens: Any
    length: jax.Array


def slots(tokens: int) -> int:
    """Slots of a cache for ``tokens`` tokens: many are a multiple of 1024, or XLA, which splits the sum over
    a long cache, copies it at every step into whole parts (docs/eval.md, decoding).
    """
    return tokens if tokens <= 65536 else -(-tokens // 1024) * 1024


def packed_indices(rows: Rows, start: jax.Array | int, window: int) -> tuple[jax.Array, jax.Array]:
    """(index_T, first_BT) of tokens whose first is at place ``start`` of the row."""
    index_T = start + jnp.arange(rows.positions.shape[1], dtype=jnp.int32)
    first_BT = index_T - rows.positions
    return index_T, jnp.maximum(first_BT, index_T - window + 1) if window else first_BT


class Held(NamedTuple):
    """Tokens that a layer attends to, which it may leave to others.

    tokens: pytree of [B, S, ...].
    start: int32 [], place in the row of the first query; None without a cache: S is T, and so are the places.
    index_S: the places of ``tokens``; None without a cache.
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
        kept = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, 1),
            cache.tokens,
            tokens,
        )
        return TokenCache(kept, length), Held(kept, cache.length, jnp.arange(size, dtype=jnp.int32))
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
