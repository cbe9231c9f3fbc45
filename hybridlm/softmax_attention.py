"""Softmax attention within the documents of rows that have no cache."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hybridlm import pieces, sharding
from hybridlm.rows import Rows
from hybridlm.sharding import per_shard
from pallas_kernels import softmax_attention
from pallas_kernels.documents import document_starts
from pallas_kernels.softmax_attention import blockwise


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, *,
    scale: float, window: int = 0, gathered: bool = False,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`.

    gathered: where rows are cut over devices, every device has all keys and values already.
    """
    if over := pieces.over(q_BTHK.shape[1]):
        token_axes, row = ("batch", "time", "heads", None), ("batch", "time")
        op = lambda *args: (_of_a_piece(*args, scale=scale, window=window, gathered=gathered, axis=over),)
        key_axes = ("batch", None, "heads", None) if gathered else token_axes
        run = per_shard(op, (token_axes, key_axes, key_axes, row), (token_axes,))
        return run(q_BTHK, k_BTGK, v_BTGV, rows.segment_ids)[0]
    return softmax_attention(q_BTHK, k_BTGK, v_BTGV, segment_ids=rows.segment_ids, scale=scale, window=window)


def _of_a_piece(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, segment_ids: jax.Array, *,
    scale: float, window: int, gathered: bool, axis: str,
) -> jax.Array:  # fmt: skip
    """`attend` for the queries of a piece: over all keys of the row, or those that its window reaches."""
    batch, length = q_BTHK.shape[:2]
    start, total = jax.lax.axis_index(axis) * length, jax.lax.axis_size(axis) * length
    ids = pieces.gather(segment_ids, axis)
    index = jnp.arange(total, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(document_starts(ids, (batch, total)), index, 0), axis=1)
    first_BT = jax.lax.dynamic_slice_in_dim(first, start, length, axis=1)
    index_T = start + jnp.arange(length, dtype=jnp.int32)
    if window:
        first_BT = jnp.maximum(first_BT, index_T - window + 1)
    halo = window - 1
    if not window or gathered or halo >= total - length:
        keys, values = (x if gathered else pieces.gather(x, axis) for x in (k_BTGK, v_BTGV))
        return blockwise(q_BTHK, keys, values, index_T, first_BT, index, scale=scale)
    keys, values = (jnp.concatenate([pieces.before(x, halo, axis), x], axis=1) for x in (k_BTGK, v_BTGV))
    index_S = start - halo + jnp.arange(halo + length, dtype=jnp.int32)
    return blockwise(q_BTHK, keys, values, index_T, first_BT, index_S, scale=scale, window=window)


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


def visible(context: int, window: int) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
