"""The public step: checks its arguments and hands them to a backend."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.linear_attention.checks import expect, floating, heads_fit, scale_of
from pallas_kernels.linear_attention_step.call import StepCall

OP = Op("linear_attention_step", __package__, ("triton", "xla"))


def linear_attention_step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    *,
    state: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding. B may be any number of leading axes, none included.

    Args:
        q_BHK, k_BHK: [B, H, K].  v_BHV: [B, HV, V].
        state: [B, HV, K, V], float32 (or float64); the computation runs in this dtype.
        log_decay: None, [B, HV] or [B, HV, K].  beta: None or [B, HV].
        scale, qk_l2norm, backend: as in `linear_attention`.

    Returns:
        (o [B, HV, V] in v's dtype, the state after the token in its own dtype).

    Raises:
        ValueError: an impossible shape, dtype or backend, by argument name.
    """
    *batch, heads, key_dim = floating("q_BHK", q_BHK, 2).shape
    value_heads, value_dim = floating("v_BHV", v_BHV, 2).shape[-2:]
    if key_dim < 1:
        raise ValueError(f"q_BHK.shape = {q_BHK.shape}: must have K >= 1 ([B, H, K])")
    if value_dim < 1:
        raise ValueError(f"v_BHV.shape = {v_BHV.shape}: must have V >= 1 ([B, HV, V])")
    expect("k_BHK", k_BHK, {(*batch, heads, key_dim)})
    expect("v_BHV", v_BHV, {(*batch, value_heads, value_dim)})
    heads_fit("v_BHV", v_BHV.shape, heads, value_heads)
    expect("state", state, {(*batch, value_heads, key_dim, value_dim)})
    if state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"state.dtype = {state.dtype}: must be float32 or float64")
    expect("log_decay", log_decay, {(*batch, value_heads), (*batch, value_heads, key_dim)})
    expect("beta", beta, {(*batch, value_heads)})
    scale = scale_of(scale, key_dim)
    call = StepCall(q_BHK, k_BHK, v_BHV, state, log_decay, beta, scale, bool(qk_l2norm))
    o, state = OP.compute(call, backend)
    return o.astype(v_BHV.dtype), state
