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
    unit_rows,
)

VALUES = 64  # taken at a time


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
        compiler_params=plgpu.CompilerParams(num_warps=4 if K <= 128 else 8, num_stages=1),
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
    q, k = refs.q[...].astype(F32), refs.k[...].astype(F32)
    if spec.l2norm:
        q, k = q * unit_rows(q, L2NORM_EPS), k * unit_rows(k, L2NORM_EPS)
    i, j = grid()
    visible, enter, leave, carry = i >= j, None, None, None
    if refs.documents is not None:
        ids = refs.documents["id"][...]
        visible &= ids[:, None] == ids[None, :]
        enter, leave = refs.documents["enter"][...][:, None], refs.documents["leave"][...][:, None]
        carry = refs.documents["carry"][...]
    decayed = _per_channel if spec.channel else _per_head
    read, keys, queries, total, qk, kk = decayed(spec, refs, q, k)
    if enter is not None:
        read, queries, keys, total = read * enter, queries * enter, keys * leave, total * carry
    out["queries"][...] = (queries * spec.scale).astype(BF16)
    out["keys"][...] = keys.astype(BF16)
    out["total"][...] = total
    out["scores"][...] = jnp.where(visible, qk * spec.scale, 0.0).astype(BF16)
    if spec.delta:
        beta = refs.rows["beta"][...]
        A = inverse_less_one(jnp.where(visible & (i > j), beta[:, None] * kk, 0.0))
        read = beta[:, None] * read
        out["w"][...] = (read + dot(A, read)).astype(BF16)
        for start in range(0, refs.v.shape[1], VALUES):
            at = (slice(None), pl.ds(start, VALUES))
            v = refs.v[at].astype(F32) * beta[:, None]
            out["u"][at] = (v + dot(A, v)).astype(BF16)


def _per_head(spec: Spec, refs: Inputs, q: Any, k: Any) -> tuple[Any, ...]:
    """K e^G, K with the decay to the end, Q e^G, the chunk's decay, Q K^T and K K^T with the decay between."""
    qk = dot(q, k, (1, 1))
    kk = dot(k, k, (1, 1)) if spec.delta else None
    total = jnp.full((k.shape[1],), 1.0, F32)
    if "sum" not in refs.rows:
        return k, k, q, total, qk, kk
    G, enter, leave = (refs.rows[name][...] for name in ("sum", "enter", "leave"))
    decay = jnp.exp(jnp.minimum(G[:, None] - G[None, :], 0.0))
    total = total * jnp.min(enter)
    kk = kk * decay if spec.delta else None
    return k * enter[:, None], k * leave[:, None], q * enter[:, None], total, qk * decay, kk


def _per_channel(spec: Spec, refs: Inputs, q: Any, k: Any) -> tuple[Any, ...]:
    """As `_per_head`; each level of pairs has its products, of factors in [0, 1] only."""
    steps = clamped(refs.steps)
    i, j = grid()
    qk = jnp.where(i == j, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    kk = jnp.zeros((C, C), F32)
    for s in LEVELS:
        decay = jnp.exp(sums(spans(s), steps))
        near = (k * decay).astype(BF16)
        qk = jnp.where(pairs(s), dot(q * decay, near, (1, 1)), qk)
        if spec.delta:
            kk = jnp.where(pairs(s), dot(near, near, (1, 1)), kk)
    prefix, suffix = jnp.exp(sums(i >= j, steps)), jnp.exp(sums(i < j, steps))
    total = jnp.min(prefix, axis=0)
    return k * prefix, k * suffix, q * prefix, total, qk, kk


def clamped(steps_ref: Any) -> tuple[Any, ...]:
    """The log-decays as a sum of bf16 tiles; exactly, if they are bf16."""
    steps = steps_ref[...]
    if steps.dtype == BF16:
        return (jnp.maximum(steps.astype(F32), LEAST_DECAY).astype(BF16),)
    return split(jnp.maximum(steps.astype(F32), LEAST_DECAY))
