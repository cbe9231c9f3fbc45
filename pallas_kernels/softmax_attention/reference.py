"""The oracle: all T x T scores at once, in float32 or, if an argument is float64, in float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_attention.call import AttentionCall


def softmax_attention(call: AttentionCall) -> jax.Array:
    """See `pallas_kernels.softmax_attention`."""
    q, k, v = call.q, call.k, call.v
    dtype = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    k, v = (jnp.repeat(x.astype(dtype), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(dtype), k, precision=exact) * call.scale
    index = jnp.arange(q.shape[1])
    seen = (index <= index[:, None]) & (index >= call.first()[..., None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v, precision=exact).astype(call.v.dtype)
