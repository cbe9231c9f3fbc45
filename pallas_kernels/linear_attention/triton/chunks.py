"""Every chunk alone: what the scan needs of it.

With G the log-decay from the chunk's start and A = (I + L)^-1, L = beta kk, where kk is the strictly lower
part of K K^T with the decay between the tokens: w = A beta (K e^G), u = A beta V, keys = K with the decay to
the chunk's end, queries = scale Q e^G, scores = scale Q K^T with the decay between, total the chunk's decay:
    V' = u - w S    (additive: V' = V)
    o  = queries S + scores V'
    S <- total S + keys^T V'
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.triton.arrays import run
from pallas_kernels.linear_attention.triton.inputs import Inputs, Spec
from pallas_kernels.linear_attention.triton.launch import warpgroup_products
from pallas_kernels.linear_attention.triton.tiles import (
    BF16,
    F32,
    LEVELS,
    C,
    dot,
    exp,
    grid,
    inverse_less_one,
    pairs,
    sums,
)
from pallas_kernels.linear_attention.triton.tokens import SLICE, clamped, ends, load, part, slices


class Chunks(NamedTuple):
    """queries, keys, w: [B, T, HV, K] bf16.  u: [B, T, HV, V] bf16.  scores: [B, HV, T, C] bf16.

    total: [B, HV, T/C, K] float32.  w is None and u is v for an additive update.
    For the gradient of the delta rule: inverse, A - I, and kk [B, HV, T, C] bf16.
    """

    queries: jax.Array
    keys: jax.Array
    scores: jax.Array
    total: jax.Array
    u: jax.Array
    w: jax.Array | None = None
    inverse: jax.Array | None = None
    kk: jax.Array | None = None


def chunks(spec: Spec, inputs: Inputs, keep: bool = False) -> Chunks:
    names = ["queries", "keys", "scores", "total", *("w", "u") * spec.delta]
    names += ("inverse", "kk") * (spec.delta and keep)
    made = run(spec, functools.partial(_kernel, spec), "chunks", [inputs], names)
    return Chunks(**({"u": inputs.v} | made))


def _kernel(spec: Spec, refs: Any, out: dict[str, Any]) -> None:
    i, j = grid()
    token = load(spec, refs)
    products = _per_channel(spec, refs) if spec.channel else _per_head(spec, refs, token.decay)
    scores = products[0] * (token.q_unit * spec.scale)[:, None] * token.k_unit[None, :]
    out["scores"][...] = jnp.where(token.visible, scores, 0.0).astype(BF16)
    A = None
    if spec.delta:
        kk = products[1] * token.k_unit[:, None] * token.k_unit[None, :]
        kk = jnp.where(token.visible & (i > j), kk, 0.0)
        A = inverse_less_one(token.beta[:, None] * kk).astype(BF16)
        if "kk" in out:
            out["kk"][...], out["inverse"][...] = kk.astype(BF16), A

    def keys(n: Any, _: None) -> None:
        q, k = refs.q[part(n)].astype(F32), refs.k[part(n)].astype(F32)
        read, total = k, jnp.full((SLICE,), 1.0, F32)
        if spec.channel:
            prefix, suffix = ends(refs.steps[part(n)], spec.interpret)
            q, read, k, total = q * prefix, k * prefix, k * suffix, jnp.min(prefix, axis=0)
        out["queries"][part(n)] = (q * token.queries[:, None]).astype(BF16)
        out["keys"][part(n)] = (k * token.keys[:, None]).astype(BF16)
        out["total"][part(n)[1]] = total * token.carry
        if spec.delta:
            read = read * (token.reads * token.beta)[:, None]
            out["w"][part(n)] = (read + dot(A, read)).astype(BF16)

    def values(n: Any, _: None) -> None:
        v = refs.v[part(n)].astype(F32) * token.beta[:, None]
        out["u"][part(n)] = (v + dot(A, v)).astype(BF16)

    slices(refs.q, keys, None)
    if spec.delta:
        slices(refs.v, values, None)


def _per_head(spec: Spec, refs: Any, decay: Any) -> tuple[Any, ...]:
    """Q K^T and, for the delta rule, K K^T, with the decay between, at j <= i."""

    def add(n: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
        k = refs.k[part(n)]
        rows = (refs.q[part(n)], k)
        return tuple(a + dot(x, k, (1, 1)) for a, x in zip(products, rows, strict=False))

    products = slices(refs.q, add, (jnp.zeros((C, C), F32),) * (1 + spec.delta))
    return products if decay is None else tuple(a * decay for a in products)


def _per_channel(spec: Spec, refs: Any) -> tuple[Any, ...]:
    """As `_per_head`; each level of pairs has its products, of factors in [0, 1] only."""
    i, j = grid()
    width = SLICE if warpgroup_products() else SLICE // 2  # else too few registers are left
    zeros = (jnp.zeros((C, C), F32),) * (1 + spec.delta)

    def level(n: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
        where = refs.masks[0, n]

        def add(m: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
            mine = part(m, width)
            decay = exp(sums(where, clamped(refs.steps[mine])), spec.interpret)
            near = (refs.k[mine] * decay).astype(BF16)
            rows = (refs.q[mine] * decay, near)
            return tuple(a + dot(x, near, (1, 1)) for a, x in zip(products, rows, strict=False))

        at = pairs(n)
        news = slices(refs.q, add, zeros, width)
        return tuple(jnp.where(at, new, a) for new, a in zip(news, products, strict=True))

    def same(n: Any, total: Any) -> Any:
        return total + jnp.sum(refs.q[part(n)].astype(F32) * refs.k[part(n)].astype(F32), axis=1)

    diagonal = slices(refs.q, same, jnp.zeros((C,), F32))
    products = (jnp.where(i == j, diagonal[:, None], 0.0), *zeros[1:])
    return jax.lax.fori_loop(0, LEVELS, level, products)
