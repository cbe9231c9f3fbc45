"""The public op: checks its arguments, normalises them into a `Call` and hands it to a backend."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.documents import document_starts
from pallas_kernels.dplr.call import Call
from pallas_kernels.linear_attention.call import alike, compute_dtype
from pallas_kernels.linear_attention.checks import expect, floating, scale_of

OP = Op("dplr", __package__, ("xla",))


def dplr(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    log_decay: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention whose state passes through a diagonal plus a rank-one matrix (DPLR).

    Per head, with S_0 the initial state and all vectors columns::

        S_t = (Diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    a reads the state before it is decayed. RWKV-7 (arXiv 2503.14456) has a = -kappa, b = kappa * rate; the
    delta rule with a gate per key channel, Gated DeltaNet-2 (2605.22791), has a = exp(g) * gate * k, b = -k.

    Args:
        q, k, a, b: [B, T, H, K], floating. Any T >= 1.  v: [B, T, H, V], floating.
        log_decay: [B, T, H, K]; natural log, <= 0, of any size.
        initial_state: None (zeros) or [B, H, K, V]; it belongs to the document of the first token.
        segment_ids: None or integers [B, T]; wherever neighbours differ a document starts and the state is
            reset exactly, as long as all numbers of the row are finite.
        scale: a Python number; K**-0.5 when None.
        backend: "reference" (token loop, the oracle) or "xla" (chunkwise, any device), which is "auto".

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token [B, H, K, V] in float32, or float64 if q,
        k or v is).

    Raises:
        ValueError: a shape, dtype or backend that is impossible, by argument name.
    """
    batch, length, heads, key_dim = floating("q", q, 4, exact=True).shape
    value_dim = floating("v", v, 4, exact=True).shape[-1]
    if 0 in q.shape or value_dim < 1:
        raise ValueError(f"q.shape = {q.shape}, v.shape = {v.shape}: must have no axis of size 0")
    for name, x in (("k", k), ("a", a), ("b", b), ("log_decay", log_decay)):
        expect(name, x, {(batch, length, heads, key_dim)})
    expect("v", v, {(batch, length, heads, value_dim)})
    expect("initial_state", initial_state, {(batch, heads, key_dim, value_dim)})
    dtype = compute_dtype(q, k, v)
    if initial_state is None:
        initial_state = jax.lax.full_like(v, 0, dtype, (batch, heads, key_dim, value_dim))
    starts = None if segment_ids is None else document_starts(segment_ids, (batch, length))
    state = jnp.asarray(initial_state, dtype)
    call = Call(q, k, v, a, b, log_decay, state, starts, scale_of(scale, key_dim))
    return OP.compute(alike(call), backend)
