"""The oracle: all T x T scores at once, in float32 or, if an argument is float64, in float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_attention.call import AttentionCall


def softmax_attention(call: AttentionCall) -> jax.Array:
    """See `pallas_kernels.softmax_attention`."""
    q, k, v = call.q, call.k, call.v
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in (q, k, v, call.forgotten) if x is not None))
    k, v = (jnp.repeat(x.astype(dtype), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(dtype), k, precision=exact) * call.scale
    if call.forgotten is not None:
        c_BHT = jnp.moveaxis(call.forgotten.astype(dtype), 2, 1)
        scores += c_BHT[..., None] - c_BHT[..., None, :]
    index = jnp.arange(q.shape[1])
    first = call.first()
    first_BHT = first[:, None] if call.since is None else jnp.moveaxis(first, 2, 1)
    seen = (index <= index[:, None]) & (index >= first_BHT[..., None])
    if call.sink_tokens:
        start = call.document()[:, None, :, None]
        seen |= (index <= index[:, None]) & (index >= start) & (index < start + call.sink_tokens)
    scores = jnp.where(seen, scores, -jnp.inf)
    if call.sinks is not None:
        sinks = jnp.broadcast_to(call.sinks.astype(dtype)[:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : q.shape[1]]
    return jnp.einsum("bhts,bshv->bthv", weights, v, precision=exact).astype(call.v.dtype)
