"""Blockwise attention in memory linear in T, on any device, for whole rows and for caches.

A document is contiguous, so the tokens that a query may see are a range of indices, from its document's (or
window's) first to its own: no T x T mask is needed. Queries go in blocks, each rematerialised in the backward
pass, so that only one block of scores exists at a time.

Shape legend: B batch, T queries, S keys, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.softmax_attention.call import KEPT, AttentionCall

MAX_BLOCK = 1024  # queries a block
SCORES = 1 << 21  # scores a block per row and head: blocks shrink as S grows


def softmax_attention(call: AttentionCall) -> jax.Array:
    """See `pallas_kernels.softmax_attention`."""
    index_T = jnp.arange(call.q.shape[1], dtype=jnp.int32)
    first_BT = call.first()
    first_BT = jnp.broadcast_to(first_BT, (*call.q.shape[:2], *first_BT.shape[2:]))
    first = (call.k, call.v, call.sink_places()) if call.sink_tokens else None
    return blockwise(
        call.q, call.k, call.v, index_T, first_BT, index_T, scale=call.scale, window=call.window,
        sinks_H=call.sinks, forgotten_BTH=call.forgotten, forgotten_BSH=call.forgotten, first=first,
    )  # fmt: skip


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
    sinks_H: jax.Array | None = None,
    forgotten_BTH: jax.Array | None = None,
    forgotten_BSH: jax.Array | None = None,
    first: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """o [B, T, H, V]: softmax(scale q k^T) v over the keys s with first <= index_S[s] <= index_T[t].

    index_T, index_S: int32 place of each query and key in the row; a negative index_S is an empty slot.
    first_BT: the first place that each query may see; at most its own.  Or [B, T, H], that of each head.
    window: with keys in order, the last of them the queries' own (index_S = arange, or a halo before it),
        the most that a query sees, to skip the rest; 0: no bound.
    sinks_H, forgotten_BTH, forgotten_BSH: see `AttentionCall`; forgotten of queries and of keys.
    first: keys of their own for each query: (k [B, F, G, K], v [B, F, G, V], int32 [B, T, N]: which of the F
        each query sees besides, -1 for none).
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
    forgotten = None
    if forgotten_BTH is not None and forgotten_BSH is not None:
        forgotten = padded(forgotten_BTH, 1), forgotten_BSH

    if first is not None:
        first = *first[:2], padded(first[2], 1)

    @jax.checkpoint
    def attend_block(
        start: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, forgotten: Any, own: Any
    ) -> jax.Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        place_T, low_BT = cut(index_T, axis=0), cut(first_BT, axis=1)
        place_S = index_S
        if span < keys:
            low = jnp.clip(start + end - span, 0, keys - span)
            k, v = (jax.lax.dynamic_slice_in_dim(x, low, span, axis=1) for x in (k, v))
            place_S = jax.lax.dynamic_slice_in_dim(index_S, low, span)
            if forgotten is not None:
                forgotten = forgotten[0], jax.lax.dynamic_slice_in_dim(forgotten[1], low, span, axis=1)
        bias = None if forgotten is None else (cut(forgotten[0], axis=1), forgotten[1])
        low = low_BT[:, None, None] if low_BT.ndim == 2 else by_head(low_BT, k.shape[2])
        seen = (place_S <= place_T[:, None]) & (place_S >= jnp.maximum(low, 0)[..., None])
        own = None if own is None else (*own[:2], cut(own[2], axis=1))
        return _softmax(cut(q, axis=1), k, v, seen, scale, sinks, bias, own)

    arrays = q_BTHK, k_BSGK, v_BSGV, sinks_H, forgotten, first
    if blocks == 1:
        return checkpoint_name(attend_block(jnp.int32(0), *arrays), KEPT)
    starts = block * jnp.arange(blocks, dtype=jnp.int32)
    o = jax.lax.map(lambda start: attend_block(start, *arrays), starts)
    o = jnp.moveaxis(o, 0, 1).reshape(o.shape[1], blocks * block, *o.shape[3:])[:, :length]
    return checkpoint_name(o, KEPT)


def by_head(x_BTH: jax.Array, groups: int) -> jax.Array:
    """[B, G, H / G, T], as scores have them before the axis of keys."""
    return jnp.moveaxis(x_BTH.reshape(*x_BTH.shape[:2], groups, -1), 1, 3)


def gathered(x_BFGK: jax.Array, at: jax.Array) -> jax.Array:
    """x_BFGK[b, at[b]]: [B, ..., G, K] for at [B, ...]."""
    return jax.vmap(lambda x, one: x[one])(x_BFGK, at)


def max_logits(
    q_BTHK: jax.Array, k_BTGK: jax.Array, segment_ids_BT: jax.Array, *,
    scale: float, window: int = 0, sink_tokens: int = 0,
) -> jax.Array:  # fmt: skip
    """Each head's largest scale q_t . k_s over the pairs that attention sees, float32 [H]; ids of 0 left out.

    Blockwise as attention is; -inf where there is no pair.
    """
    batch, length, heads, dim = q_BTHK.shape
    groups = k_BTGK.shape[2]
    starts_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    call = AttentionCall(q_BTHK, k_BTGK, k_BTGK, starts_BT, scale, window, sink_tokens=sink_tokens)
    first_BT = call.first()
    block = min(MAX_BLOCK, max(16, SCORES // length), length)
    blocks = -(-length // block)
    padded = lambda x: jnp.pad(x, [(0, blocks * block - length if a == 1 else 0) for a in range(x.ndim)])
    split = lambda x: jnp.moveaxis(padded(x).reshape(batch, blocks, block, *x.shape[2:]), 1, 0)
    index_S = jnp.arange(length, dtype=jnp.int32)

    def largest(xs: tuple[jax.Array, ...]) -> jax.Array:
        q, first, place_T, real, *at = xs  # padding has id 0
        q = q.reshape(batch, block, groups, heads // groups, dim)
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, k_BTGK, preferred_element_type=jnp.float32) * scale
        seen = (index_S <= place_T[..., None]) & (index_S >= first[..., None]) & real[..., None]
        most = jnp.max(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=(0, 3, 4))
        for at_BTN in at:
            own = gathered(k_BTGK, jnp.maximum(at_BTN, 0))
            scores = jnp.einsum("btgrk,btngk->bgrtn", q, own, preferred_element_type=jnp.float32) * scale
            seen = (at_BTN >= 0) & real[..., None]
            more = jnp.max(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=(0, 3, 4))
            most = jnp.maximum(most, more)
        return most

    place_BT = jnp.broadcast_to(index_S, (batch, length))
    arrays = q_BTHK, first_BT, place_BT, segment_ids_BT != 0, *[call.sink_places()] * (sink_tokens > 0)
    each = jax.lax.map(largest, tuple(map(split, arrays)))
    return jnp.max(each, axis=0).reshape(heads)


def _softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    sinks_H: jax.Array | None,
    forgotten: tuple[jax.Array, jax.Array] | None,
    own: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> jax.Array:
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    if forgotten is not None:
        now, then = (by_head(c, groups) for c in forgotten)
        scores += now[..., None] - then[..., None, :]
    scores, keys = jnp.where(seen, scores, jnp.finfo(jnp.float32).min), k.shape[1]
    if own is not None:
        k_own, v_own = (gathered(x, jnp.maximum(own[2], 0)) for x in own[:2])
        more = jnp.einsum("btgrk,btngk->bgrtn", q, k_own, preferred_element_type=jnp.float32) * scale
        more = jnp.where((own[2] >= 0)[:, None, None], more, jnp.finfo(jnp.float32).min)
        scores = jnp.concatenate([scores, more], axis=-1)
    if sinks_H is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_H.astype(jnp.float32).reshape(groups, -1, 1, 1)
        most = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
        weights = jnp.exp(scores - most)
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - most)
    weights = weights.astype(v.dtype)
    o = jnp.einsum("bgrts,bsgv->btgrv", weights[..., :keys], v)
    if own is not None:
        o += jnp.einsum("bgrtn,btngv->btgrv", weights[..., keys:], v_own)
    return o.reshape(batch, length, heads, v.shape[-1])
