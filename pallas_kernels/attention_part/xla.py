"""Blockwise on any device: the queries go in blocks, so that only one block of scores exists at a time.

Shape legend: N blocks of C queries; G groups of R heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_part.call import UNSEEN, PartCall
from pallas_kernels.softmax_attention.xla import MAX_BLOCK, SCORES


class _Block(NamedTuple):
    """Of C queries. q, do, o: [B, C, G, R, ...].  log_sum: [B, G, R, C].  place: [C].  real: [B, C]."""

    place: jax.Array
    real: jax.Array
    q: jax.Array
    do: jax.Array | None = None
    o: jax.Array | None = None
    log_sum: jax.Array | None = None


def attention_part(call: PartCall) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.attention_part`."""
    batch, length, heads, _ = call.q.shape
    size = min(MAX_BLOCK, max(16, SCORES // call.k.shape[1]), length)
    count, groups = -(-length // size), call.k.shape[2]
    pad = lambda x, axis: jnp.pad(x, [(0, count * size - length if a == axis else 0) for a in range(x.ndim)])

    def cut(x: jax.Array) -> jax.Array:
        x = pad(x, 1).reshape(batch, count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def apart(x: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [N, B, C, G, R, ...]
        return cut(x.reshape(batch, length, groups, heads // groups, *x.shape[3:]))

    def whole(x: jax.Array) -> jax.Array:  # its inverse
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, heads, *x.shape[5:])[:, :length]

    index_NC = jnp.arange(count * size).reshape(count, size)
    blocks = _Block(index_NC, cut(call.real()), apart(call.q))
    if call.merged is None:
        o, log_sum = jax.lax.map(lambda block: _forward(call, block), blocks)
        return whole(o), jnp.moveaxis(whole(jnp.moveaxis(log_sum, -1, 2)), 1, 2)
    do, o, log_sum = call.merged
    sums = jnp.moveaxis(apart(jnp.moveaxis(log_sum, 1, 2)), 2, -1)
    blocks = blocks._replace(do=apart(do), o=apart(o), log_sum=sums)

    def add(total: tuple, block: _Block) -> tuple:
        dq, dk, dv = _backward(call, block)
        return (total[0] + dk, total[1] + dv), dq

    zeros = tuple(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in (call.k, call.v))
    dq: jax.Array
    (dk, dv), dq = jax.lax.scan(add, zeros, blocks)
    return whole(dq), dk.astype(call.k.dtype), dv.astype(call.v.dtype)


def _logits(call: PartCall, block: _Block) -> tuple[jax.Array, jax.Array]:
    """(scaled logits [B, G, R, C, S], which are seen, [B, 1, 1, C, S])."""
    logits = jnp.einsum("bcgrk,bsgk->bgrcs", block.q, call.k, preferred_element_type=jnp.float32) * call.scale
    if call.keys is None:
        seen = (jnp.arange(call.k.shape[1]) <= block.place[:, None])[None]
    else:
        seen = call.among(call.keys[:, None, None])
    return logits, (seen & block.real[..., None])[:, None, None]


def _forward(call: PartCall, block: _Block) -> tuple[jax.Array, jax.Array]:
    logits, seen = _logits(call, block)
    logits = jnp.where(seen, logits, UNSEEN)
    most = jnp.max(logits, axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(logits - most), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    some = total > 0
    p = (p / jnp.where(some, total, 1)).astype(call.v.dtype)
    log_sum = jnp.where(some, most + jnp.log(jnp.where(some, total, 1)), UNSEEN)[..., 0]
    return jnp.einsum("bgrcs,bsgv->bcgrv", p, call.v), log_sum


def _backward(call: PartCall, block: _Block) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits, seen = _logits(call, block)
    assert block.do is not None and block.o is not None and block.log_sum is not None
    exact = dict(preferred_element_type=jnp.float32)
    p = jnp.where(seen, jnp.exp(logits - block.log_sum[..., None]), 0)
    dv = jnp.einsum("bgrcs,bcgrv->bsgv", p.astype(block.do.dtype), block.do, **exact)
    product = jnp.sum(block.do.astype(jnp.float32) * block.o.astype(jnp.float32), axis=-1)
    dp = jnp.einsum("bcgrv,bsgv->bgrcs", block.do, call.v, **exact) - jnp.moveaxis(product, 1, -1)[..., None]
    ds = (call.scale * p * dp).astype(call.q.dtype)
    dq = jnp.einsum("bgrcs,bsgk->bcgrk", ds, call.k)
    return dq, jnp.einsum("bgrcs,bcgrk->bsgk", ds, block.q, **exact), dv
