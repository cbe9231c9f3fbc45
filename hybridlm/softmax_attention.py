"""Causal softmax attention within documents, in memory linear in T, and its token cache.

A document is contiguous, so the tokens that a query may see are a range of indices, from its document's (or
window's) first to its own: no T x T mask is needed. Queries go in blocks, each rematerialised in the backward
pass, so that at most one block's scores exist at a time.

Shape legend: B batch, T queries, S keys, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows

MAX_BLOCK = 1024  # queries a block
SCORES = 1 << 21  # scores a block per row and head: blocks shrink as S grows
log = logging.getLogger("hybridlm")


class TokenCache(NamedTuple):
    """What attention keeps of past tokens.

    tokens: pytree of [B, size, ...]. Token n is in slot n; with a window, of which only ``size`` tokens are
        kept, in slot n % size.
    length: int32 [], tokens appended so far, the same for all rows.
    """

    tokens: Any
    length: jax.Array


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_T: jax.Array,
    first_BT: jax.Array,
    index_S: jax.Array,
    *,
    scale: float,
    window: int = 0,
) -> jax.Array:
    """o [B, T, H, V]: softmax(scale q k^T) v over the keys s with first <= index_S[s] <= index_T[t].

    index_T, index_S: int32 place of each query and key in the row; a negative index_S is an empty slot.
    first_BT: the first place that each query may see; at most its own.
    window: with keys in order (index_S = arange), the most that a query sees, to skip the rest; 0: no bound.
    """
    length, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    block = min(MAX_BLOCK, max(16, SCORES // keys), length)
    blocks = -(-length // block)
    span = min(keys, block + window) if window else keys
    kernel = _cudnn_block if _use_cudnn(q_BTHK, k_BSGK, v_BSGV) else _softmax_block

    def padded(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, blocks * block - length if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths, mode="edge")  # every row must see something, or its gradient is NaN

    q_BTHK, index_T, first_BT = padded(q_BTHK, 1), padded(index_T, 0), padded(first_BT, 1)

    @jax.checkpoint
    def attend_block(start: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        place_T, first = cut(index_T, axis=0), cut(first_BT, axis=1)
        place_S = index_S
        if span < keys:
            low = jnp.clip(start + block - span, 0, keys - span)
            k, v = (jax.lax.dynamic_slice_in_dim(x, low, span, axis=1) for x in (k, v))
            place_S = jax.lax.dynamic_slice_in_dim(index_S, low, span)
        seen = (place_S <= place_T[:, None]) & (place_S >= jnp.maximum(first, 0)[..., None])
        return kernel(cut(q, axis=1), k, v, seen, scale)

    if blocks == 1:
        return attend_block(jnp.int32(0), q_BTHK, k_BSGK, v_BSGV)
    starts = block * jnp.arange(blocks, dtype=jnp.int32)
    o = jax.lax.map(lambda start: attend_block(start, q_BTHK, k_BSGK, v_BSGV), starts)
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], blocks * block, *o.shape[3:])[:, :length]


def _softmax_block(q: jax.Array, k: jax.Array, v: jax.Array, seen_BTS: jax.Array, scale: float) -> jax.Array:
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    o = jnp.einsum("bgrts,bsgv->btgrv", weights, v)
    return o.reshape(batch, length, heads, v.shape[-1])


def _cudnn_block(q: jax.Array, k: jax.Array, v: jax.Array, seen_BTS: jax.Array, scale: float) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=seen_BTS[:, None], scale=scale, implementation="cudnn")


def _use_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN's fused kernel takes these arrays; on a GPU the reason why not is logged once."""
    if jax.default_backend() != "gpu":
        return False
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    if q.shape[1] == 1:  # a decode step is bound by reading the cache, which XLA does as well
        return False
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return _refuse(f"its arrays are {q.dtype}")
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 128:
        return _refuse(f"its head dims are {q.shape[-1]} and {v.shape[-1]}")
    return even or _refuse("its lengths are odd")


@functools.cache
def _refuse(reason: str) -> bool:
    log.warning("attention uses XLA instead of cuDNN's fused kernel: %s", reason)
    return False


def packed_indices(rows: Rows, start: jax.Array | int, window: int) -> tuple[jax.Array, jax.Array]:
    """(index_T, first_BT) of tokens whose first is at place ``start`` of the row."""
    index_T = start + jnp.arange(rows.positions.shape[1], dtype=jnp.int32)
    first_BT = index_T - rows.positions
    return index_T, jnp.maximum(first_BT, index_T - window + 1) if window else first_BT


def append(cache: TokenCache, tokens: Any, window: int) -> tuple[TokenCache, Any, jax.Array]:
    """(cache with ``tokens`` (pytree of [B, T, ...]) appended, keys to attend to, their index_S).

    The caller keeps the total within the size; only a cache with a window may wrap.
    """
    count = jax.tree.leaves(tokens)[0].shape[1]
    size = jax.tree.leaves(cache.tokens)[0].shape[1]
    length = cache.length + count
    if not window:
        kept = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, 1),
            cache.tokens,
            tokens,
        )
        return TokenCache(kept, length), kept, jnp.arange(size, dtype=jnp.int32)
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
    return TokenCache(kept, length), everything, index_S
