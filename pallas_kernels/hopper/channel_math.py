"""Pairs of tokens of a chunk under a decay per key channel, exact for any decay.

Within a block of b tokens let m be the last token of its first half and E_i the sum of log-decays from m to
i: positive before m, negative after it. A pair j < i of the block needs 2^(E_i - E_j) = 2^E_i 2^-E_j in
every channel, two scaled copies of the tile and one product. For a pair across the middle both factors are
at most 1. For a pair within a half one may overflow, and then the blocks of b / 2 tokens serve it: the
levels b = 64, 32, ..., 2 each overwrite the pairs of their blocks, and end as soon as no |E| of the level
exceeds RANGE. Ordinary gates need one level, log-decays of -5 a step at most three, any at most six.

E is a product of a matrix of 0, 1 and -1 with the log-decays: sums of terms of one sign, so nothing cancels.
The products take them as two float16 parts (22 bits) and accumulate in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.blocks import F32, C
from pallas_kernels.hopper.chunk_math import sums_of_products

LEAST = -128.0  # a log2-decay whose power is 0 in float32; below it nothing changes but the size of sums
RANGE = 96.0  # 2^96 times a bf16 number stays finite, and 2^-96 times one keeps its 8 bits
F16 = jnp.float16


def store_parts(log_decay: jax.Array, high: Any, low: Any, *, interpret: Any) -> None:
    """A float32 tile of natural log-decays as two float16 tiles whose sum is it in base 2."""
    steps = jnp.maximum(log_decay * blocks.LOG2E, LEAST)
    part = steps.astype(F16)
    blocks.store(high, part, interpret=interpret)
    blocks.store(low, (steps - part.astype(F32)).astype(F16), interpret=interpret)


def hidden_zero(reach: Any) -> jax.Array:
    """0, which the compiler cannot know: `reach` is a shared-memory vector of numbers that are not negative.

    Added to indices it keeps addresses and masks from being hoisted into registers. Added to a mask that is a
    left operand it is needed: registers that the compiler knows to be constant reach wgmma wrong (seen on
    hardware, ptxas of CUDA 13.0).
    """
    return jnp.where(reach[0] < 0.0, 1, 0)


def up_to(zero: jax.Array) -> jax.Array:
    """Row i sums the tokens t <= i of the chunk; zero: a `hidden_zero`."""
    return _flags(blocks.col_index() <= blocks.by_row(_row() + zero), 1.0)


def after(zero: jax.Array) -> jax.Array:
    """Row i sums the tokens t > i of the chunk."""
    return _flags(blocks.col_index() > blocks.by_row(_row() + zero), 1.0)


def from_middle(size: jax.Array) -> jax.Array:
    """Row i sums the tokens from the middle of its block of `size` to i: 1 after the middle, -1 before."""
    row = _row()
    middle = (row & -size) + (size >> 1)
    late = row >= middle
    first, last = jnp.where(late, middle, row + 1), jnp.where(late, row, middle - 1)
    return _flags(_columns(first, last), blocks.by_row(jnp.where(late, 1.0, -1.0).astype(F16)))


def within(size: jax.Array) -> jax.Array:
    """Pairs (i, j), j < i, of one block of `size` tokens."""
    row = _row()
    return _columns(row & -size, row - 1)


def _row() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS)


def _columns(first: jax.Array, last: jax.Array) -> jax.Array:
    """In each row the columns first..last: two numbers a row are all that a thread keeps of such a mask."""
    col = blocks.col_index()
    return (col >= blocks.by_row(first)) & (col <= blocks.by_row(last))


def _flags(keep: jax.Array, value: Any) -> jax.Array:
    return jnp.where(keep, jnp.asarray(value, F16), jnp.zeros((), F16))


def sums(which: jax.Array, parts: list[tuple[Any, Any]], *, interpret: Any) -> tuple[jax.Array, ...]:
    """`which` @ log-decays for every 64 channels, given as (high, low): float32 tiles in base 2."""
    products = [([(which, high), (which, low)], (C, C)) for high, low in parts]
    return sums_of_products(*products, interpret=interpret)


def note_reach(offsets: tuple[jax.Array, ...], reach: Any) -> None:
    """The largest |E| of every token, for `next_size` (which wants a barrier in between)."""
    largest = (jnp.max(jnp.abs(x), axis=1) for x in offsets)
    reach[...] = functools.reduce(jnp.maximum, largest)


def next_size(size: jax.Array, reach: Any) -> jax.Array:
    """Size of the blocks of the next level; 0 if this one was exact for all pairs of its blocks.

    |E| is largest at the ends of a block. Only ends of 16 tokens are read: below that, go to the end.
    """
    ends = [reach[i] for block in range(0, C, 16) for i in (block, block + 15)]
    done = (functools.reduce(jnp.maximum, ends) <= RANGE) & (size >= 16)
    return jnp.where(done, 0, size >> 1)


def any_row(x: jax.Array, *, interpret: Any) -> jax.Array:
    """A row of a tile [C, C] whose rows are alike, as a number per column; no exchange between threads."""
    if interpret:
        return x[0]

    @plgpu.inline_mgpu(
        arg_types=(blocks.WGMMA,), return_type=plgpu.ShapeDtypeStruct((C,), x.dtype, layout=blocks.COLS)
    )
    def take(_: Any, tile: Any) -> Any:
        layout = blocks.COLS.to_mgpu()
        first = tile.registers[0, :, 0, 0, 0].reshape(layout.registers_shape((C,)))
        return mgpu.FragmentedArray(_registers=first, _layout=layout, _is_signed=None)

    return take(x)
