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
    scale: float, window: int = 0, sinks: jax.Array | None = None, log_forget: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`."""
    if over := pieces.over(q_BTHK.shape[1]):
        token_axes, row = ("batch", "time", "heads", None), ("batch", "time")
        in_axes = (token_axes, token_axes, token_axes, row, None if sinks is None else ("heads",),
                   None if log_forget is None else token_axes[:3])  # fmt: skip
        op = lambda *args: (_of_a_piece(*args, scale=scale, window=window, axis=over),)
        return per_shard(op, in_axes, (token_axes,))(
            q_BTHK, k_BTGK, v_BTGV, rows.segment_ids, sinks, log_forget
        )[0]

    def op_alone(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sinks: Any, log_forget: Any
    ) -> tuple[jax.Array]:
        # Each device for its own rows and heads: how cuDNN is told of documents is for the rows to decide.
        return (
            softmax_attention(
                q, k, v, segment_ids=segment_ids, scale=scale, window=window,
                sinks=sinks, log_forget=log_forget,
            ),
        )  # fmt: skip

    heads = ("batch", "time", "heads", None)
    extras = None if sinks is None else ("heads",), None if log_forget is None else heads[:3]
    return per_shard(op_alone, (heads, heads, heads, heads[:2], *extras), (heads,))(
        q_BTHK, k_BTGK, v_BTGV, rows.segment_ids, sinks, log_forget
    )[0]


def record_largest(
    context: Context, q_BTHK: jax.Array, k_BTGK: jax.Array, *, scale: float, window: int = 0
) -> None:
    """Records "max.logit" [H], if it is wanted: each head's largest scaled logit, padding left out."""
    if context.wants("max.logit"):
        q, k = map(jax.lax.stop_gradient, (q_BTHK, k_BTGK))
        ids = context.rows.segment_ids
        context.record("max.logit", max_logits(q, k, ids, scale=scale, window=window))


def _of_a_piece(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, segment_ids: jax.Array,
    sinks_H: jax.Array | None, log_forget_BTH: jax.Array | None, *,
    scale: float, window: int, axis: str,
) -> jax.Array:  # fmt: skip
    """`attend` for the queries of a piece.

    Keys go round in a ring; those that a window reaches come before the piece's own. So do all of them where
    there is a forget gate, or for a piece of an odd number of tokens.
    """
    length, rest = q_BTHK.shape[1], q_BTHK.shape[1] * (jax.lax.axis_size(axis) - 1)
    if not window and log_forget_BTH is None and length % 2 == 0:
        return ring_attention(q_BTHK, k_BTGK, v_BTGV, segment_ids, sinks_H, scale=scale, axis=axis)
    halo = min(window - 1, rest) if window else rest
    longer = lambda x: jnp.concatenate([pieces.before(x, halo, axis), x], axis=1)
    keys, values, ids = longer(k_BTGK), longer(v_BTGV), longer(segment_ids + 1)  # 0: before the row
    if log_forget_BTH is None and halo < length:
        queries = jnp.pad(q_BTHK, ((0, 0), (halo, 0), (0, 0), (0, 0)))
        options: dict[str, Any] = dict(
            segment_ids=ids, scale=scale, window=window, sinks=sinks_H, backend="xla"
        )
        return softmax_attention(queries, keys, values, **options)[:, halo:]
    index_S = jnp.arange(halo + length, dtype=jnp.int32)
    first_BS = AttentionCall(
        keys, keys, values, document_starts(ids, (len(ids), halo + length)), scale, window
    ).first()
    forgotten = None if log_forget_BTH is None else jnp.cumsum(longer(log_forget_BTH), axis=1)
    return blockwise(
        q_BTHK, keys, values, index_S[halo:], first_BS[:, halo:], index_S, scale=scale, window=window,
        sinks_H=sinks_H, forgotten_BSH=forgotten,
        forgotten_BTH=None if forgotten is None else forgotten[:, halo:],
    )  # fmt: skip


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


def visible(context: int, window: int) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
