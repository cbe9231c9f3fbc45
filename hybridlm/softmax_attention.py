"""Softmax attention within the documents of rows that have no cache."""

import jax

from hybridlm.rows import Rows
from pallas_kernels import softmax_attention


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, *, scale: float, window: int = 0
) -> jax.Array:
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`."""
    return softmax_attention(q_BTHK, k_BTGK, v_BTGV, segment_ids=rows.segment_ids, scale=scale, window=window)


def visible(context: int, window: int) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
