"""Softmax attention within the documents of rows that have no cache, and its largest logits."""

import jax

from hybridlm.context import Context
from hybridlm.rows import Rows
from pallas_kernels import softmax_attention
from pallas_kernels.softmax_attention import max_logits


def attend(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    rows: Rows,
    *,
    scale: float,
    window: int = 0,
    sinks: jax.Array | None = None,
    log_forget: jax.Array | None = None,
) -> jax.Array:
    """o [B, T, H, V]: see `pallas_kernels.softmax_attention`."""
    return softmax_attention(
        q_BTHK, k_BTGK, v_BTGV, segment_ids=rows.segment_ids, scale=scale, window=window,
        sinks=sinks, log_forget=log_forget,
    )  # fmt: skip


def record_largest(
    context: Context, q_BTHK: jax.Array, k_BTGK: jax.Array, *, scale: float, window: int = 0
) -> None:
    """Records "max.logit" [H], if it is wanted: each head's largest scaled logit, padding left out."""
    if context.wants("max.logit"):
        q, k = map(jax.lax.stop_gradient, (q_BTHK, k_BTGK))
        ids = context.rows.segment_ids
        context.record("max.logit", max_logits(q, k, ids, scale=scale, window=window))


def visible(context: int, window: int) -> float:
    """Tokens that one sees on average, itself included, in a document of ``context``; window 0: all of it."""
    window = min(window or context, context)
    return window - window * (window - 1) / (2 * context)  # mean of min(t, window) over t = 1..context
