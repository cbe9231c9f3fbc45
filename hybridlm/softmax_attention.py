"""Softmax attention within the documents of rows that have no cache, and its largest logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import pieces, sharding
from hybridlm.context import Context
from hybridlm.rows import Rows
from hybridlm.sharding import per_shard
from pallas_kernels import softmax_attention
from pallas_kernels.documents import document_starts
from pallas_kernels.softmax_attention import blockwise, max_logits, sink_places


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, *,
    scale: float, window: int = 0, gathered: bool = False,
    sinks: jax.Array | None = None, log_forget: jax.Array | None = None, sink_tokens: int = 0,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`.

    gathered: where rows are cut over devices, every device has all keys and values already.
    sink_tokens: the first tokens of each document that the window keeps in sight.
    """
    over = pieces.over(q_BTHK.shape[1])
    size: dict[str, Any] = dict(scale=scale, window=window, sink_tokens=sink_tokens)

    def op(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sinks: Any, log_forget: Any
    ) -> tuple[jax.Array]:
        extras = {"sinks": sinks, "log_forget": log_forget} | size
        if over:
            return (_of_a_piece(q, k, v, segment_ids, **extras, gathered=gathered, axis=over),)
        # Each device for its own rows and heads: how cuDNN is told of documents is for the rows to decide.
        return (softmax_attention(q, k, v, segment_ids=segment_ids, **extras),)

    heads = ("batch", "time", "heads", None)
    keys = ("batch", None, "heads", None) if over and gathered else heads
    extra_axes = None if sinks is None else ("heads",), None if log_forget is None else heads[:3]
    run = per_shard(op, (heads, keys, keys, heads[:2], *extra_axes), (heads,))
    return run(q_BTHK, k_BTGK, v_BTGV, rows.segment_ids, sinks, log_forget)[0]


def record_largest(
    context: Context, q_BTHK: jax.Array, k_BTGK: jax.Array, *,
    scale: float, window: int = 0, sink_tokens: int = 0,
) -> None:  # fmt: skip
    """Records "max.logit" [H], if it is wanted: each head's largest scaled logit, padding left out."""
    if context.wants("max.logit"):
        q, k = map(jax.lax.stop_gradient, (q_BTHK, k_BTGK))
        ids = context.rows.segment_ids
        most_H = max_logits(q, k, ids, scale=scale, window=window, sink_tokens=sink_tokens)
        context.record("max.logit", most_H)


def _of_a_piece(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, segment_ids: jax.Array, *,
    sinks: jax.Array | None, log_forget: jax.Array | None,
    scale: float, window: int, sink_tokens: int, gathered: bool, axis: str,
) -> jax.Array:  # fmt: skip
    """`attend` for the queries of a piece: over all keys of the row, or those that its window reaches."""
    batch, length = q_BTHK.shape[:2]
    start, total = jax.lax.axis_index(axis) * length, jax.lax.axis_size(axis) * length
    ids = pieces.gather(segment_ids, axis)
    index = jnp.arange(total, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(document_starts(ids, (batch, total)), index, 0), axis=1)
    first_BT = jax.lax.dynamic_slice_in_dim(first, start, length, axis=1)
    index_T = start + jnp.arange(length, dtype=jnp.int32)
    document_BT = first_BT
    if window:
        first_BT = jnp.maximum(first_BT, index_T - window + 1)
    halo = window - 1
    whole = not window or gathered or halo >= total - length or sink_tokens > 0
    forgotten_BTH = forgotten_BSH = None
    if log_forget is not None:
        forgotten_BSH = jnp.cumsum(pieces.gather(log_forget, axis), axis=1)
        forgotten_BTH = jax.lax.dynamic_slice_in_dim(forgotten_BSH, start, length, axis=1)
        if not whole:
            padded = jnp.pad(forgotten_BSH, ((0, 0), (halo, 0), (0, 0)))
            forgotten_BSH = jax.lax.dynamic_slice_in_dim(padded, start, halo + length, axis=1)
    extras: dict[str, Any] = dict(sinks_H=sinks, forgotten_BTH=forgotten_BTH, forgotten_BSH=forgotten_BSH)
    if whole:
        keys, values = (x if gathered else pieces.gather(x, axis) for x in (k_BTGK, v_BTGV))
        if sink_tokens:
            extras["first"] = keys, values, sink_places(document_BT, first_BT, sink_tokens)
        return blockwise(q_BTHK, keys, values, index_T, first_BT, index, scale=scale, **extras)
    keys, values = (jnp.concatenate([pieces.before(x, halo, axis), x], axis=1) for x in (k_BTGK, v_BTGV))
    index_S = start - halo + jnp.arange(halo + length, dtype=jnp.int32)
    return blockwise(q_BTHK, keys, values, index_T, first_BT, index_S, scale=scale, window=window, **extras)


def imbalance(positions_BT: jax.Array, windows: Sequence[int]) -> jax.Array:
    """Of softmax attention's work, that of the busiest device over the mean of all: 1 is even.

    Work: the pairs of query and key that are seen, in layers of these ``windows`` (0: none), which each
    device has for its own tokens [B, T]. One document over N contiguous pieces: (2N - 1) / N.
    """
    rows, time = sharding.parts("batch"), sharding.parts("time")
    seen_BT = (positions_BT + 1).astype(jnp.float32)
    work_BT = sum((jnp.minimum(seen_BT, w) if w else seen_BT for w in windows), jnp.zeros_like(seen_BT))
    batch, length = work_BT.shape
    work = work_BT.reshape(rows, batch // rows, time, length // time).sum((1, 3))
    return jnp.max(work) / jnp.mean(work)


def visible(context: int, window: int, sink_tokens: int = 0) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    if sink_tokens and 0 < window < context:
        left = context - window
        return visible(context, window) + visible(left, sink_tokens) * left / context
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
