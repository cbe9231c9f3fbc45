"""The oracle: all scores at once, in float32 or, if q is float64, in float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_part.call import UNSEEN, PartCall


def attention_part(call: PartCall) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.attention_part`."""
    dtype = jnp.promote_types(call.q.dtype, jnp.float32)
    repeats = call.q.shape[2] // call.k.shape[2]
    q, k, v = call.q.astype(dtype), *(jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (call.k, call.v))
    seen_B1TS = call.seen()[:, None]
    logits = jnp.where(seen_B1TS, jnp.einsum("bthk,bshk->bhts", q, k) * call.scale, UNSEEN)
    if call.merged is None:
        log_sum = jnp.maximum(jax.nn.logsumexp(logits, axis=-1), UNSEEN)
        p = jnp.where(seen_B1TS, jnp.exp(logits - log_sum[..., None]), 0)
        return jnp.einsum("bhts,bshv->bthv", p, v).astype(call.v.dtype), log_sum
    do, o = (x.astype(dtype) for x in call.merged[:2])
    p = jnp.where(seen_B1TS, jnp.exp(logits - call.merged.log_sum[..., None]), 0)
    dp = jnp.einsum("bthv,bshv->bhts", do, v) - jnp.einsum("bthv,bthv->bht", do, o)[..., None]
    ds = call.scale * p * dp
    grouped = lambda x: x.reshape(*x.shape[:2], -1, repeats, x.shape[-1]).sum(3)
    dq, dk = jnp.einsum("bhts,bshk->bthk", ds, k), grouped(jnp.einsum("bhts,bthk->bshk", ds, q))
    dv = grouped(jnp.einsum("bhts,bthv->bshv", p, do))
    return dq.astype(call.q.dtype), dk.astype(call.k.dtype), dv.astype(call.v.dtype)
