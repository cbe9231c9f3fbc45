"""What the chunkwise gradients share: sums of products of tiles, and the gradient of the log-decay."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import F32


def sums_of_products(
    *sums: tuple[Sequence[tuple], Any], interpret: Any, meanwhile: Callable[[], None] = lambda: None
) -> tuple[jax.Array, ...]:
    """`start + a @ b + c @ d + ...` for each sum ([(a, b), (c, d), ...], start); all are in flight together.

    start: a float32 tile, or the shape of one to start from zero. Operands and hazards as in `blocks.matmul`.
    meanwhile: what is done until they are there.
    """
    if interpret:
        meanwhile()
        return tuple(_interpreted(pairs, start) for pairs, start in sums)

    def accumulate(accs: Any) -> None:
        for acc, (pairs, _) in zip(accs, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        meanwhile()

    if all(isinstance(start, tuple) for _, start in sums):

        def from_zero(*accs: Any) -> tuple[jax.Array, ...]:
            accumulate(accs)
            return tuple(acc[...] for acc in accs)

        out = pl.run_scoped(from_zero, *[plgpu.ACC(shape, F32) for _, shape in sums])
    else:
        starts = [blocks.zeros(start) if isinstance(start, tuple) else start for _, start in sums]
        out = pl.run_state(accumulate)(tuple(plgpu.ACC.init(start) for start in starts))
    return tuple(lax.optimization_barrier(tuple(out)))


def _interpreted(pairs: Sequence[tuple], start: Any) -> jax.Array:
    out = jnp.zeros(start, F32) if isinstance(start, tuple) else start
    for a, b in pairs:
        out = out + jnp.dot(a[...].astype(F32), b[...].astype(F32), precision=lax.Precision.HIGHEST)
    return out


def log_decay_gradient(d_sum: jax.Array, d_end: jax.Array, shift: Any = 0) -> jax.Array:
    """Numbers per row from numbers per column: log_decay_t is part of G_i for every i >= t, and of G_C.

    d_sum: gradient of G_i.  d_end: numbers whose sum is the gradient of G_C.  shift: 0, or a zero unknown to
    the compiler, which then cannot keep the mask in registers over a loop.
    """
    later = blocks.col_index() >= blocks.row_index() + shift
    return jnp.sum(jnp.where(later, blocks.by_col(d_sum), 0.0) + blocks.by_col(d_end), axis=1)
