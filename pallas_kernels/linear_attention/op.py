"""The public op: checks its arguments, normalises them into a `Call` and hands it to a backend."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.documents import document_starts
from pallas_kernels.linear_attention.call import Call, alike
from pallas_kernels.linear_attention.checks import expect, floating, heads_fit, scale_of

OP = Op("linear_attention", __package__, ("hopper", "triton", "xla"))


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    output_final_state: bool = False,
    axis: str | None = None,
    continues: jax.Array | None = None,
    strong: bool = False,
    backend: str = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal linear attention with decay and either the additive or the delta-rule update.

    Per value head, with S_0 the initial state and all vectors columns::

        delta (beta given):    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        additive (beta None):  S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    With log_decay per channel and beta this is KDA (Kimi Linear, arXiv 2510.26692, eq. 1); with one decay per
    head Gated DeltaNet (2412.06464); without decay DeltaNet (2406.06484); additive with channel decay GLA
    (2312.06635) and HGRN-2 (2404.07904), with head decay RetNet (2307.08621).

    Args:
        q, k: [B, T, H, K], floating. Any T >= 1.
        v: [B, T, HV, V], floating, HV a multiple of H; value head h reads key head h // (HV // H).
        log_decay: None (no decay), [B, T, HV] (one per head) or [B, T, HV, K] (one per key channel); natural
            log, <= 0, of any finite size: -120 forgets everything, 0 nothing.
        beta: None or [B, T, HV], usually in [0, 2].
        initial_state: None (zeros) or [B, HV, K, V]; it belongs to the document of the first token.
        segment_ids: None or integers [B, T]; wherever neighbours differ a document starts and the state is
            reset exactly. Ids may be reused: only changes count.
        scale: a Python number; K**-0.5 when None.
        qk_l2norm: normalise q and k first, x * rsqrt(sum(x^2) + 1e-6) over K, gradients included.
        output_final_state: also return the state after the last token.
        axis: within `jax.shard_map`, the mesh axis that rows are cut over: the arrays are of one piece of N,
            which starts from the state that those before it leave. Without initial and final states.
        continues: with ``axis``, bool [N, B]: whether each piece's first token is of the document before it.
        strong: whether beta |k|^2 is above 1 at many tokens (beta up to 2). It is right either way: kernels
            that would hand such tokens to others are not asked (decays per channel on Hopper GPUs).
        backend: "reference" (token loop, the oracle), "xla" (chunkwise, any device), "hopper" (kernels),
            "triton" (kernels for NVIDIA GPUs since Ampere), "pallas" (the first of these kernels that can) or
            "auto": kernels where they support the call, else "xla", logged once per reason.
        interpret: run the Pallas kernels in interpret mode (slow, for tests without a GPU).

    Returns:
        (o, final_state): o [B, T, HV, V] in v's dtype; final_state [B, HV, K, V] in float32 (float64 if q, k
            or v is float64), or None unless output_final_state.

    Raises:
        ValueError: a shape, dtype or backend that is impossible, by argument name; or kernels by name for
            a call that they do not support, with the reason.
    """
    call = normalize(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=scale,
        qk_l2norm=qk_l2norm,
        output_final_state=output_final_state,
        axis=axis,
        continues=continues,
        strong=strong,
        interpret=interpret,
    )
    return OP.compute(call, backend)


def normalize(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None, **others: Any) -> Call:
    """The arguments of `linear_attention` but its backend, checked; also for `pieces.summarize`."""
    batch, length, heads, key_dim = floating("q", q, 4, exact=True).shape
    value_heads, value_dim = floating("v", v, 4, exact=True).shape[-2:]
    if length < 1 or key_dim < 1:
        raise ValueError(f"q.shape = {q.shape}: must have T >= 1 and K >= 1 ([B, T, H, K])")
    if value_dim < 1:
        raise ValueError(f"v.shape = {v.shape}: must have V >= 1 ([B, T, HV, V])")
    expect("k", k, {(batch, length, heads, key_dim)})
    expect("v", v, {(batch, length, value_heads, value_dim)})
    heads_fit("v", v.shape, heads, value_heads)
    call = Call(q, k, v, scale=scale_of(scale, key_dim), **others)
    gates = (batch, length, value_heads)
    expect("log_decay", call.log_decay, {gates, (*gates, key_dim)})
    expect("beta", call.beta, {gates})
    state, ids = call.initial_state, call.segment_ids
    if call.axis is not None and (state is not None or call.output_final_state or call.continues is None):
        raise ValueError(f"axis = {call.axis!r}: takes continues, no initial_state and no output_final_state")
    expect("initial_state", state, {(batch, value_heads, key_dim, value_dim)})
    starts = None if ids is None else document_starts(ids, (batch, length))
    return alike(
        dataclasses.replace(
            call,
            initial_state=None if state is None else jnp.asarray(state, call.compute_dtype),
            segment_ids=None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32),
        )
    )
