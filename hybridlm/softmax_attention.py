"""Softmax attention within the documents of rows that have no cache, and its largest logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import pieces, sharding
from hybridlm.context import Context
from hybridlm.ring_attention import order, ring_attention
from hybridlm.rows import Rows
from hybridlm.sharding import per_shard
from pallas_kernels import softmax_attention
from pallas_kernels.documents import document_starts
from pallas_kernels.softmax_attention import blockwise, max_logits
from pallas_kernels.softmax_attention.call import AttentionCall


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, *,
    scale: float, window: int = 0, sink_tokens: int = 0,
    sinks: jax.Array | None = None, log_forget: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`."""
    over = pieces.over(q_BTHK.shape[1])
    size: dict[str, Any] = dict(scale=scale, window=window, sink_tokens=sink_tokens)

    def op(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sinks: Any, log_forget: Any
    ) -> tuple[jax.Array]:
        extras = {"sinks": sinks, "log_forget": log_forget} | size
        if jax.sharding.get_abstract_mesh().manual_axes:
            # JAX takes what depends on documents alone out of the loop over layers, with cuDNN's empty bias.
            # An empty array from one shard_map to another ends jaxlib 0.11 with a segmentation fault.
            q, segment_ids = jax.lax.optimization_barrier((q, segment_ids))
        if over:
            return (_of_a_piece(q, k, v, segment_ids, **extras, axis=over),)
        # Each device for its own rows and heads: how cuDNN is told of documents is for the rows to decide.
        return (softmax_attention(q, k, v, segment_ids=segment_ids, **extras),)

    heads = ("batch", "time", "heads", None)
    extra_axes = None if sinks is None else ("heads",), None if log_forget is None else heads[:3]
    run = per_shard(op, (heads, heads, heads, heads[:2], *extra_axes), (heads,))
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
    scale: float, window: int, sink_tokens: int, axis: str,
) -> jax.Array:  # fmt: skip
    """`attend` for the queries of a piece.

    Keys go round in a ring; those that a window reaches come before the piece's own. So do all of them where
    there is a forget gate or a window has sink tokens, or for a piece of an odd number of tokens.
    """
    length, rest = q_BTHK.shape[1], q_BTHK.shape[1] * (jax.lax.axis_size(axis) - 1)
    if not window and log_forget is None and length % 2 == 0:
        return ring_attention(q_BTHK, k_BTGK, v_BTGV, segment_ids, sinks, scale=scale, axis=axis)
    halo = min(window - 1, rest) if window and not sink_tokens else rest
    longer = lambda x: jnp.concatenate([pieces.before(x, halo, axis), x], axis=1)
    keys, values, ids = longer(k_BTGK), longer(v_BTGV), longer(segment_ids + 1)  # 0: before the row
    size: dict[str, Any] = dict(scale=scale, window=window)
    if log_forget is None and halo < length:
        queries = jnp.pad(q_BTHK, ((0, 0), (halo, 0), (0, 0), (0, 0)))
        o = softmax_attention(queries, keys, values, segment_ids=ids, sinks=sinks, **size)
        return o[:, halo:]
    index_S = jnp.arange(halo + length, dtype=jnp.int32)
    starts = document_starts(ids, (len(ids), halo + length))
    call = AttentionCall(keys, keys, values, starts, **size, sink_tokens=sink_tokens)
    extras: dict[str, Any] = {"sinks_H": sinks}
    if log_forget is not None:
        forgotten = jnp.cumsum(longer(log_forget), axis=1)
        extras |= {"forgotten_BTH": forgotten[:, halo:], "forgotten_BSH": forgotten}
    if sink_tokens:
        extras["first"] = keys, values, call.sink_places()[:, halo:]
    first_BT = call.first()[:, halo:]
    return blockwise(q_BTHK, keys, values, index_S[halo:], first_BT, index_S, **size, **extras)


def imbalance(positions_BT: jax.Array, windows: Sequence[int]) -> jax.Array:
    """Of softmax attention's work, that of the busiest device over the mean of all: 1 is even.

    Work: the pairs of query and key that are seen, in layers of these ``windows`` (0: none). A device has
    them for the blocks that it computes (`ring_attention`), of windows for its own tokens [B, T].
    """
    rows, time = sharding.parts("batch"), sharding.parts("time")
    batch, length = positions_BT.shape
    seen_BT = (positions_BT + 1).astype(jnp.float32)
    split = lambda x: x.reshape(rows, batch // rows, time, 2, length // time // 2).sum((1, 4))

    def work(window: int) -> jax.Array:
        if window:
            return split(jnp.minimum(seen_BT, window)).sum(-1)
        return split(seen_BT).reshape(rows, 2 * time)[:, order(time)].sum(-1)

    total = sum(map(work, windows), jnp.zeros((rows, time)))
    return jnp.max(total) / jnp.mean(total)


def visible(context: int, window: int, sink_tokens: int = 0) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    if sink_tokens and 0 < window < context:
        left = context - window
        return visible(context, window) + visible(left, sink_tokens) * left / context
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
