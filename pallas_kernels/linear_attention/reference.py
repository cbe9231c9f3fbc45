"""The oracle: the recurrence one token at a time, in float32 or, for float64 inputs, float64.

Slow, and its backward keeps one state per token; every other backend is held against it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import Call, l2_normalize


def linear_attention(call: Call) -> tuple[jax.Array, jax.Array | None]:
    """See `pallas_kernels.linear_attention`; a `lax.scan` over the T axis."""
    if call.axis is not None:
        raise ValueError(f"axis = {call.axis!r}: the token loop takes whole rows")
    tokens = (call.q, call.k, call.v, call.log_decay, call.beta, call.starts())

    def token(state: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, beta, starts = inputs
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], 0, state)
        return update(state, q, k, v, decay, beta, scale=call.scale, qk_l2norm=call.qk_l2norm)[::-1]

    state, o = jax.lax.scan(token, call.state(), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    o = jnp.moveaxis(o, 0, 1).astype(call.v.dtype)
    return o, state if call.output_final_state else None


def update(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    *,
    scale: float,
    qk_l2norm: bool,
) -> tuple[jax.Array, jax.Array]:
    """One token: decay, then the delta or additive update, then the read. Computes in the dtype of ``state``.

    Shapes: state [..., HV, K, V]; q, k [..., H, K]; v [..., HV, V]; log_decay [..., HV] or [..., HV, K];
    beta [..., HV]. Returns (o [..., HV, V], state), both in the dtype of ``state``.
    """
    q, k, v = (x.astype(state.dtype) for x in (q, k, v))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    group = v.shape[-2] // k.shape[-2]
    q, k = (jnp.repeat(x, group, axis=-2) for x in (q * scale, k))
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(state.dtype))
        state = state * (decay[..., None] if decay.ndim == state.ndim - 1 else decay[..., None, None])
    if beta is not None:
        # The delta rule writes the difference between v and what the decayed state holds under k.
        held = jnp.einsum("...k,...kv->...v", k, state, precision=jax.lax.Precision.HIGHEST)
        v = beta.astype(state.dtype)[..., None] * (v - held)
    state = state + k[..., :, None] * v[..., None, :]
    o = jnp.einsum("...k,...kv->...v", q, state, precision=jax.lax.Precision.HIGHEST)
    return o, state
