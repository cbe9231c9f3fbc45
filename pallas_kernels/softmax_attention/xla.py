"""Blockwise attention in memory linear in T, on any device, for whole rows and for caches.

A document is contiguous, so the tokens that a query may see are a range of indices, from its document's (or
window's) first to its own: no T x T mask is needed. Queries go in blocks, each rematerialised in the backward
pass, so that only one block of scores exists at a time.

Shape legend: B batch, T queries, S keys, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_attention.call import AttentionCall

MAX_BLOCK = 1024  # queries a block
SCORES = 1 << 21  # scores a block per row and head: blocks shrink as S grows


def softmax_attention(call: AttentionCall) -> jax.Array:
    """See `pallas_kernels.softmax_attention`."""
    index_T = jnp.arange(call.q.shape[1], dtype=jnp.int32)
    first_BT = jnp.broadcast_to(call.first(), call.q.shape[:2])
    return blockwise(call.q, call.k, call.v, index_T, first_BT, index_T, scale=call.scale, window=call.window)


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
    window: with keys in order, the last of them the queries' own (index_S = arange, or a halo before it),
        the most that a query sees, to skip the rest; 0: no bound.
    """
    length, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    block = min(MAX_BLOCK, max(16, SCORES // keys), length)
    blocks = -(-length // block)
    span = min(keys, block + window) if window else keys
    end = block + keys - length  # of the keys of the first block

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
            low = jnp.clip(start + end - span, 0, keys - span)
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
