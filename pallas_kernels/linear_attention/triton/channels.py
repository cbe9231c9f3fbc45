"""Every chunk and slice of channels alone: the gradients of q, k and the log-decays, one per channel.

A kernel apart from `backward`, whose [C, C] tiles would leave it too few registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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
    split,
    sums,
)
from pallas_kernels.linear_attention.triton.tokens import clamped, ends, load

WIDTH = 32  # channels of a slice; with the delta rule 9.0 spills 72 bytes a thread, and 16 are slower


def channels(spec: Spec, inputs: Inputs, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """q, k [B, T, HV, K] bf16 and steps [B, T, HV, K] float32, gradients by name.

    values: of `Chunks`, total and, for the delta rule, inverse; of `Moves`, dqueries, dkeys, dtotal, dw; of
    `backward`, dqk, dkk [B, HV, T, C] bf16, each plus its transposed, and q_row, k_row [B, HV, T] float32.
    """
    kernel, count = functools.partial(_kernel, spec), spec.sizes["K"] // WIDTH
    return run(spec, kernel, "channels", [inputs, values], ("q", "k", "steps"), slices=count)


def _kernel(spec: Spec, refs: Any, made: dict[str, Any], out: dict[str, Any]) -> None:
    i, j = grid()
    token = load(spec, refs)
    at = pl.ds(pl.program_id(0) % (refs.q.shape[1] // WIDTH) * WIDTH, WIDTH)
    mine = slice(None), at
    q, k = refs.q[mine], refs.k[mine]
    prefix, suffix = ends(refs.steps[mine], spec.interpret)
    dq = made["dqueries"][mine].astype(F32) * token.queries[:, None] * prefix
    dk = made["dkeys"][mine].astype(F32) * token.keys[:, None] * suffix
    up_to, after = q * dq, k * dk
    if spec.delta:
        read = solved(made["inverse"][...].T, made["dw"][mine]) * (token.reads * token.beta)[:, None] * prefix
        dk, up_to = dk + read, up_to + k * read
    dsteps = fine_sums(i <= j, up_to) + fine_sums(i > j, after)
    dsteps += (made["total"][at] * made["dtotal"][at])[None, :]
    diagonal = 0.5 * jnp.sum(jnp.where(i == j, made["dqk"][...].astype(F32), 0.0), axis=1)[:, None]
    dq, dk = dq + diagonal * k, dk + diagonal * q
    tokens = jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)

    def level(m: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        dq, dk, dsteps = carry
        # Keeps the loads here: fewer spills before 9.0, where it costs more than they do.
        if not (spec.interpret or warpgroup_products()):
            plgpu.debug_barrier()
        decay = exp(sums(refs.masks[0, m], clamped(refs.steps[mine])), spec.interpret)
        second = (tokens >> m & 1) == 1  # of the blocks of a pair: such q meet k of the first
        near = (refs.k[mine] * decay).astype(BF16)
        own = jnp.where(second, (refs.q[mine] * decay).astype(BF16), near)
        pair = refs.masks[2, m]
        down = dot(pair * made["dqk"][...], own)
        moved, down = own * down, down * decay
        dq, dk = jnp.where(second, dq + down, dq), jnp.where(second, dk, dk + down)
        if spec.delta:
            dnear = dot(pair * made["dkk"][...], near)
            moved, dk = moved + near * dnear, dk + dnear * decay
        return dq, dk, dsteps + fine_sums(refs.masks[1, m], moved)

    dq, dk, dsteps = jax.lax.fori_loop(0, LEVELS, level, (dq, dk, dsteps))
    q, k = refs.q[mine], refs.k[mine]
    if spec.l2norm:  # d of 1 / |q| is -q / |q|^3
        dq -= q * (made["q_row"][...] * token.q_unit * token.q_unit)[:, None]
        dk -= k * (made["k_row"][...] * token.k_unit * token.k_unit)[:, None]
    out["q"][mine], out["k"][mine], out["steps"][mine] = dq.astype(BF16), dk.astype(BF16), dsteps


def solved(A_T: Any, x: Any) -> Any:
    """A^T x with the diagonal of A, which is 1, apart."""
    return x.astype(F32) + dot(A_T, x)


def fine_sums(where: Any, x: Any) -> Any:
    """Sums of rows of x ``where`` [C, C] is true; to 2^-17."""
    return sums(where, split(x))
