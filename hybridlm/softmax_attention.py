"""Causal softmax attention within documents, in memory linear in T, and its token cache.

A document is contiguous, so the tokens that a query may see are a range of indices, from its document's (or
window's) first to its own: no T x T mask is needed. `attend` is for rows without a cache, `append` and
`blockwise` for those with one. Queries go in blocks, each rematerialised in the backward pass, so that only
one block of scores exists at a time.

Shape legend: B batch, T queries, S keys, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import functools
import logging
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows

MAX_BLOCK = 1024  # queries a block
SCORES = 1 << 21  # scores a block per row and head: blocks shrink as S grows
MARGIN = 256.0  # by which scores across documents fall short in `fused`
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
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, *, scale: float, window: int = 0
) -> jax.Array:
    """o [B, T, H, V]: causal softmax(scale q k^T) v within each document of ``rows``.

    window: tokens that a query sees, its own included; 0 for the whole document.
    On a GPU, half-precision arrays go through cuDNN's fused kernel; elsewhere through `blockwise`.
    """
    if _use_cudnn(q_BTHK, v_BTGV):
        return fused(q_BTHK, k_BTGK, v_BTGV, rows, scale, window, "cudnn")
    index_T, first_BT = packed_indices(rows, 0, window)
    return blockwise(q_BTHK, k_BTGK, v_BTGV, index_T, first_BT, index_T, scale=scale, window=window)


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Rows,
    scale: float,
    window: int,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """`attend` by `jax.nn.dot_product_attention`, which knows no documents and would need a T x T mask.

    Instead each document's number is written in binary, as -1 and 1, into extra channels of q and k: two
    tokens' scores gain the same constant within a document, which softmax ignores, and at least MARGIN less
    across documents, of which exp leaves exactly 0.
    """
    bits = q.shape[1].bit_length()
    extra = bits + -(q.shape[-1] + bits) % 8  # cuDNN wants a multiple of 8
    document_BT1 = jnp.cumsum(rows.positions == 0, axis=1)[..., None]
    code_BTE = jnp.where(document_BT1 >> jnp.arange(bits) & 1, 1, -1)
    code_BT1E = jnp.pad(code_BTE, ((0, 0), (0, 0), (0, extra - bits)))[:, :, None]
    weight = 2.0 ** math.ceil(math.log2(MARGIN / scale / 2))  # a power of 2 is exact in every dtype

    def coded(x: jax.Array, weight: float) -> jax.Array:
        code = jnp.broadcast_to(weight * code_BT1E, (*x.shape[:3], extra))
        return jnp.concatenate([x, code.astype(x.dtype)], axis=-1)

    padding = q.shape[-1] + extra - v.shape[-1]
    o = jax.nn.dot_product_attention(
        coded(q, weight),
        coded(k, 1.0),
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, padding))),
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return o[..., : v.shape[-1]]


def _use_cudnn(q: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN's fused kernel takes these arrays; on a GPU the reason why not is logged once."""
    if jax.default_backend() != "gpu":
        return False
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return _refuse(f"its arrays are {q.dtype}")
    dims = q.shape[-1] + q.shape[1].bit_length() + 7, v.shape[-1]
    largest = 256 if float(jax.devices()[0].compute_capability) >= 9 else 128
    if max(dims) > largest or v.shape[-1] > q.shape[-1]:
        return _refuse(f"its head dims are {q.shape[-1]} and {v.shape[-1]}")
    return True


@functools.cache
def _refuse(reason: str) -> bool:
    log.warning("attention uses XLA instead of cuDNN's fused kernel: %s", reason)
    return False


def blockwise(
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

    def padded(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, blocks * block - length if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths, mode="edge")

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
        return _softmax(cut(q, axis=1), k, v, seen, scale)

    if blocks == 1:
        return attend_block(jnp.int32(0), q_BTHK, k_BSGK, v_BSGV)
    starts = block * jnp.arange(blocks, dtype=jnp.int32)
    o = jax.lax.map(lambda start: attend_block(start, q_BTHK, k_BSGK, v_BSGV), starts)
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], blocks * block, *o.shape[3:])[:, :length]


def _softmax(q: jax.Array, k: jax.Array, v: jax.Array, seen_BTS: jax.Array, scale: float) -> jax.Array:
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    o = jnp.einsum("bgrts,bsgv->btgrv", weights, v)
    return o.reshape(batch, length, heads, v.shape[-1])


def visible(context: int, window: int) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context


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
