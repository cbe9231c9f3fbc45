"""The public op: checks its arguments, normalises them into an `AttentionCall` and hands it to a backend."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.documents import document_starts
from pallas_kernels.linear_attention.checks import floating, scale_of
from pallas_kernels.softmax_attention.call import AttentionCall

FORGETS = -1e30  # a log forget gate below forgets everything before it, whatever the logits

OP = Op("softmax_attention", __package__, ("cudnn", "xla"))


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: jax.Array | None = None,
    log_forget: jax.Array | None = None,
    sink_tokens: int = 0,
    backend: str = "auto",
) -> jax.Array:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the tokens s <= t of t's document and window.

    With log_forget the logits gain the sum of log_forget_i over s < i <= t (FoX, 2503.02130); with sinks
    the softmax's denominator gains exp(sinks_h) (gpt-oss); with sink_tokens the document's first tokens stay
    in sight when they leave the window (StreamingLLM, 2309.17453).

    Grouped heads (arXiv 2305.13245): query head h reads key/value head h // (H // G). What is not finite in
    k or v reaches the outputs of other documents: a weight of 0 times nan is nan, on every backend.

    Args:
        q: [B, T, H, K], floating.  k: [B, T, G, K].  v: [B, T, G, V].  H a multiple of G.
        segment_ids: None or integers [B, T]; wherever neighbours differ a document starts. Ids may be reused.
        scale: a Python number; K**-0.5 when None.
        window: tokens that a query sees, its own included; 0 for the whole document.
        sinks: None or floating [H].  log_forget: None or floating [B, T, H], at most 0; summed in float32.
            -inf (below -1e30) forgets everything before the token, and has a gradient of 0.
        sink_tokens: how many of a document's first tokens stay in sight; needs a window, and no log_forget.
        backend: "reference" (all T x T scores, the oracle), "xla" (blockwise, in memory linear in T), "cudnn"
            (its fused kernel; 16-bit arrays) or "auto": cudnn where it can, else xla, logged once per reason.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError: a shape, dtype or backend that is impossible, by argument name; or "cudnn" for a call that
            it does not support, with the reason.
    """
    batch, length, heads, dim = floating("q", q, 4, exact=True).shape
    groups, value_dim = floating("v", v, 4, exact=True).shape[2:]
    for name, array, shape in (("k", k, (groups, dim)), ("v", v, (groups, value_dim))):
        if floating(name, array, 4, exact=True).shape != (batch, length, *shape):
            raise ValueError(
                f"{name}.shape = {array.shape}: must be {(batch, length, *shape)} to match q and v"
            )
    if not groups or heads % groups:
        raise ValueError(f"q.shape = {q.shape}: its {heads} heads must be a multiple of v's {groups}")
    if type(window) is not int or window < 0:
        raise ValueError(f"window = {window!r}: must be an integer of at least 0 (0: no window)")
    if type(sink_tokens) is not int or sink_tokens < 0:
        raise ValueError(f"sink_tokens = {sink_tokens!r}: must be an integer of at least 0")
    if sink_tokens and (not window or log_forget is not None):
        raise ValueError(f"sink_tokens = {sink_tokens}: needs a window, and no log_forget")
    extras: tuple[tuple[str, jax.Array | None, tuple[int, ...]], ...]
    extras = ("sinks", sinks, (heads,)), ("log_forget", log_forget, q.shape[:3])
    for name, extra, expected in extras:
        if extra is not None and floating(name, extra, len(expected), exact=True).shape != expected:
            raise ValueError(f"{name}.shape = {extra.shape}: must be {expected} to match q")
    starts = None if segment_ids is None else document_starts(segment_ids, (batch, length))
    if not batch or not length:
        return jnp.zeros((batch, length, heads, value_dim), v.dtype)
    forgotten = since = None
    if log_forget is not None:
        everything = log_forget < FORGETS  # no part of the sums, which would hide or lose what is added after
        kept = jnp.where(everything, 0, log_forget)
        forgotten = jnp.cumsum(kept, axis=1, dtype=jnp.promote_types(log_forget.dtype, jnp.float32))
        index_T1 = jnp.arange(length, dtype=jnp.int32)[:, None]
        since = jax.lax.cummax(jnp.where(everything, index_T1, 0), axis=1)
    call = AttentionCall(q, k, v, starts, scale_of(scale, dim), window, sinks, forgotten, sink_tokens, since)
    return OP.compute(call, backend)
