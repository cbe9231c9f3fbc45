"""Every chunk alone: what the scan needs of it.

With G the decay from the chunk's start and A = (I + L)^-1, L the strictly lower part of beta K K^T with the decay
between the tokens: w = A beta (K e^G), u = A beta V, keys = K with the decay to the chunk's end, queries = scale Q e^G,
scores = scale Q K^T with the decay between, and total, the decay of the whole chunk. Then, chunk by chunk,
    V' = u - w S    (additive: V' = V)
    o  = queries S + scores V'
    S <- total S + keys^T V'
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear_attention.call import L2NORM_EPS
from pallas_kernels.linear_attention.triton.inputs import LEAST_DECAY, Inputs, Spec
from pallas_kernels.linear_attention.triton.tiles import (
    BF16,
    F32,
    LEVELS,
    C,
    dot,
    grid,
    inverse_less_one,
    pairs,
    spans,
    split,
    sums,
)

SLICE = 64  # of the features, taken at a time


class Chunks(NamedTuple):
    """queries, keys, w: [B, T, HV, K] bf16.  u: [B, T, HV, V] bf16.  scores: [B, HV, T, C] bf16.

    total: [B, HV, T/C, K] float32.  w is None and u is v for an additive update.
    """

    queries: jax.Array
    keys: jax.Array
    scores: jax.Array
    total: jax.Array
    w: jax.Array | None
    u: jax.Array


def chunks(spec: Spec, inputs: Inputs) -> Chunks:
    B, T, HV, V = inputs.v.shape
    K = inputs.q.shape[3]
    out = {
        "queries": jax.ShapeDtypeStruct((B, T, HV, K), BF16),
        "keys": jax.ShapeDtypeStruct((B, T, HV, K), BF16),
        "scores": jax.ShapeDtypeStruct((B, HV, T, C), BF16),
        "total": jax.ShapeDtypeStruct((B, HV, T // C, K), F32),
    }
    if spec.delta:
        out |= {"w": out["keys"], "u": jax.ShapeDtypeStruct((B, T, HV, V), BF16)}
    made = pl.pallas_call(
        functools.partial(_kernel, spec),
        grid=(T // C, HV, B),
        in_specs=[_blocks(spec, inputs)],
        out_specs={name: block(name, x.shape) for name, x in out.items()},
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=spec.interpret,
        name="chunks",
    )(inputs)
    return Chunks(**({"w": None, "u": inputs.v} | made))


def token_block(features: int, group: int = 1) -> pl.BlockSpec:
    """A chunk of a head of [B, T, heads, features]; ``group`` value heads share a head."""
    return pl.BlockSpec((None, C, None, features), lambda c, h, b: (b, c, h // group, 0))


def block(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    if name == "total":
        return pl.BlockSpec((None, None, None, shape[3]), lambda c, h, b: (b, h, c, 0))
    if name == "scores":
        return pl.BlockSpec((None, None, C, C), lambda c, h, b: (b, h, c, 0))
    return token_block(shape[3])


def _blocks(spec: Spec, inputs: Inputs) -> Inputs:
    row = pl.BlockSpec((None, None, C), lambda c, h, b: (b, h, c))
    token = pl.BlockSpec((None, C), lambda c, h, b: (b, c))
    documents = inputs.documents and dict.fromkeys(inputs.documents, token)
    if documents:
        documents["carry"] = pl.BlockSpec((None, None), lambda c, h, b: (b, c))
    key = token_block(inputs.q.shape[3], spec.group)
    return Inputs(
        q=key,
        k=key,
        v=token_block(inputs.v.shape[3]),
        steps=None if inputs.steps is None else token_block(inputs.steps.shape[3]),
        rows=dict.fromkeys(inputs.rows, row),
        documents=documents,
    )


def _kernel(spec: Spec, refs: Inputs, out: dict[str, Any]) -> None:
    i, j = grid()
    q_unit, k_unit = (_unit_rows(x) if spec.l2norm else None for x in (refs.q, refs.k))
    visible = i >= j
    entering = leaving = jnp.full((C,), 1.0, F32)
    carry = jnp.float32(1)
    if refs.documents is not None:
        ids = refs.documents["id"][...]
        visible &= ids[:, None] == ids[None, :]
        entering, leaving = refs.documents["enter"][...], refs.documents["leave"][...]
        carry = refs.documents["carry"][...]
    qk, kk = _per_channel(spec, refs) if spec.channel else _per_head(spec, refs)
    if spec.l2norm:
        qk *= q_unit[:, None] * k_unit[None, :]
    out["scores"][...] = jnp.where(visible, qk * spec.scale, 0.0).astype(BF16)
    A, beta = None, None
    if spec.delta:
        if spec.l2norm:
            kk *= k_unit[:, None] * k_unit[None, :]
        beta = refs.rows["beta"][...]
        A = inverse_less_one(jnp.where(visible & (i > j), beta[:, None] * kk, 0.0)).astype(BF16)

    if spec.l2norm:
        entering_k, entering_q, leaving = entering * k_unit, entering * q_unit, leaving * k_unit
    else:
        entering_k = entering_q = entering
    if "sum" in refs.rows:
        entering_k, entering_q = entering_k * refs.rows["enter"][...], entering_q * refs.rows["enter"][...]
        leaving *= refs.rows["leave"][...]
        carry *= jnp.min(refs.rows["enter"][...])
    if spec.delta:
        entering_k = entering_k * beta

    def keys(n: Any, _: None) -> None:
        at = (slice(None), pl.ds(n * SLICE, SLICE))
        q, k = refs.q[at].astype(F32), refs.k[at].astype(F32)
        read, total = k, jnp.full((SLICE,), 1.0, F32)
        if spec.channel:
            steps = clamped(refs.steps[at])
            prefix, suffix = jnp.exp(sums(i >= j, steps)), jnp.exp(sums(i < j, steps))
            q, read, k, total = q * prefix, k * prefix, k * suffix, jnp.min(prefix, axis=0)
        out["queries"][at] = (q * (entering_q * spec.scale)[:, None]).astype(BF16)
        out["keys"][at] = (k * leaving[:, None]).astype(BF16)
        out["total"][pl.ds(n * SLICE, SLICE)] = total * carry
        if spec.delta:
            read = read * entering_k[:, None]
            out["w"][at] = (read + dot(A, read)).astype(BF16)

    def values(n: Any, _: None) -> None:
        at = (slice(None), pl.ds(n * SLICE, SLICE))
        v = refs.v[at].astype(F32) * beta[:, None]
        out["u"][at] = (v + dot(A, v)).astype(BF16)

    slices(refs.q, keys, None)
    if spec.delta:
        slices(refs.v, values, None)


def slices(ref: Any, body: Any, start: Any) -> Any:
    """``body`` (number, carry) for each slice of the features of ``ref``."""
    return jax.lax.fori_loop(0, ref.shape[1] // SLICE, body, start)


def _unit_rows(ref: Any) -> Any:
    """1 / |row|, [C]."""

    def add(n: Any, total: Any) -> Any:
        x = ref[:, pl.ds(n * SLICE, SLICE)].astype(F32)
        return total + jnp.sum(x * x, axis=1)

    return jax.lax.rsqrt(slices(ref, add, jnp.full((C,), L2NORM_EPS, F32)))


def _per_head(spec: Spec, refs: Inputs) -> tuple[Any, Any]:
    """Q K^T and, for the delta rule, K K^T, with the decay between, at j <= i."""

    def add(n: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
        at = (slice(None), pl.ds(n * SLICE, SLICE))
        k = refs.k[at]
        rows = (refs.q[at], k)
        return tuple(a + dot(x, k, (1, 1)) for a, x in zip(products, rows, strict=False))

    products = slices(refs.q, add, (jnp.zeros((C, C), F32),) * (1 + spec.delta))
    if "sum" in refs.rows:
        G = refs.rows["sum"][...]
        decay = jnp.exp(jnp.minimum(G[:, None] - G[None, :], 0.0))
        products = tuple(a * decay for a in products)
    return products if spec.delta else (*products, None)


def _per_channel(spec: Spec, refs: Inputs) -> tuple[Any, Any]:
    """As `_per_head`; each level of pairs has its products, of factors in [0, 1] only."""
    i, j = grid()
    zeros = (jnp.zeros((C, C), F32),) * (1 + spec.delta)

    def level(n: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
        where = spans(1 << n)

        def add(m: Any, products: tuple[Any, ...]) -> tuple[Any, ...]:
            at = (slice(None), pl.ds(m * SLICE, SLICE))
            decay = jnp.exp(sums(where, clamped(refs.steps[at])))
            near = (refs.k[at] * decay).astype(BF16)
            rows = (refs.q[at] * decay, near)
            return tuple(a + dot(x, near, (1, 1)) for a, x in zip(products, rows, strict=False))

        at = pairs(1 << n)
        return tuple(
            jnp.where(at, new, a) for new, a in zip(slices(refs.q, add, zeros), products, strict=True)
        )

    def same(n: Any, total: Any) -> Any:
        at = (slice(None), pl.ds(n * SLICE, SLICE))
        return total + jnp.sum(refs.q[at].astype(F32) * refs.k[at].astype(F32), axis=1)

    diagonal = slices(refs.q, same, jnp.zeros((C,), F32))
    products = (jnp.where(i == j, diagonal[:, None], 0.0), *zeros[1:])
    products = jax.lax.fori_loop(0, LEVELS, level, products)
    return products if spec.delta else (*products, None)


def clamped(steps: Any) -> tuple[Any, ...]:
    """Log-decays as a sum of bf16 tiles; exactly, if they are bf16."""
    at_least = jnp.maximum(steps.astype(F32), LEAST_DECAY)
    return (at_least.astype(BF16),) if steps.dtype == BF16 else split(at_least)
