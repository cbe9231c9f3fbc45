"""Pairs of tokens of a chunk under a decay per key channel, exact for any decay
(docs/kernels_channel.md, section 6).

Within a block of b tokens let m be the first token of its second half and E_i the sum of log-decays from m
to i, or for i before m minus the sum after i. A pair j < i of the block has 2^(E_i - E_j) = 2^E_i 2^-E_j in
every channel: two scaled copies of the tile and one product. The levels b = 128 (a first half before the
chunk), 64, ..., 2 give to a row i of second halves its pairs of the block, until a level was exact for all
of them, with no |E_i| above RANGE: then the row is settled. What settles it is at or before it: so a row
does not depend on later tokens, in no bit.

E is a product of a matrix of 0, 1 and -1 with the log-decays in float16, sums of terms of one sign in
float32: rounding a sum of x by at most x 2^-12 moves exp(-x) by less than 1e-4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import interpreted
from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import C

LEAST = -128.0  # a log2-decay whose power is 0 in float32; below it nothing changes but the size of sums
RANGE = 96.0  # 2^96 times a bf16 number stays finite, and 2^-96 times one keeps its 8 bits
F16 = jnp.float16


def steps(log_decay: jax.Array) -> jax.Array:
    """Natural log-decays in base 2 and float16."""
    return jnp.maximum(log_decay * blocks.LOG2E, LEAST).astype(F16)


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


def every(reach: Any) -> jax.Array:
    """Each row sums all tokens of the chunk, in the same order: the rows are the same bits."""
    return blocks.by_row(jnp.where(blocks.row_vector(reach) < 0.0, 0.0, 1.0).astype(F16))


def from_middle(size: jax.Array, zero: jax.Array) -> jax.Array:
    """Row i sums the tokens from the middle of its block of `size` to i: 1 after the middle, -1 before.

    Of 2 C tokens: the chunk after its first token, before which no pair of the chunk decays.
    """
    row = _row() + zero
    middle = _middle(row, size)
    late = row >= middle
    start = jnp.where(size > C, 1, middle)
    first, last = jnp.where(late, start, row + 1), jnp.where(late, row, middle - 1)
    return _flags(_columns(first, last), blocks.by_row(jnp.where(late, 1.0, -1.0).astype(F16)))


def middle_of(row: jax.Array, col: jax.Array, size: jax.Array) -> jax.Array:
    """The same flags as `from_middle`, of the indices of a tile."""
    half = size >> 1
    late = (row & half) != 0
    between = ((row ^ col) < half) & (late == (col <= row))
    return jnp.where(between, jnp.where(late, 1.0, -1.0), 0.0).astype(F16)


def unsettled(size: jax.Array, reach: jax.Array, zero: jax.Array) -> jax.Array:
    """Rows that the level of blocks of `size` serves; reach: the |E_i| of the last level that served each."""
    row = _row() + zero
    return (row >= _middle(row, size)) & (reach > RANGE)


def within(size: jax.Array, rows: jax.Array, zero: jax.Array) -> jax.Array:
    """Pairs (i, j), j < i, of one block of `size` tokens, i of `rows`."""
    row = _row() + zero
    return _columns(row & -size, jnp.where(rows, row - 1, -1))


def _middle(row: jax.Array, size: jax.Array) -> jax.Array:
    """Where the second half of the row's block begins; blocks of 2 C tokens begin C before the chunk."""
    return ((row + C) & -size) + (size >> 1) - C


def _row() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS)


def _columns(first: jax.Array, last: jax.Array) -> jax.Array:
    """In each row the columns first..last: two numbers a row are all that a thread keeps of such a mask."""
    col = blocks.col_index()
    return (col >= blocks.by_row(first)) & (col <= blocks.by_row(last))


def _flags(keep: jax.Array, value: Any) -> jax.Array:
    return jnp.where(keep, jnp.asarray(value, F16), jnp.zeros((), F16))


def sums(which: jax.Array, steps: Any) -> jax.Array:
    """`which` @ `steps`, a float16 tile [C, 64] in shared memory: float32 sums in base 2."""
    return blocks.matmul((which, steps))


def next_size(size: jax.Array, reach: Any) -> jax.Array:
    """Size of the blocks of the next level; 0 if every row is settled.

    reach: of every row, as `unsettled` has it. Rows have their anchors in common, and the last the largest
    |E|, in runs of `size` / 2; only the ends of runs of 8 are read: below blocks of 16 tokens, go to the end.
    """
    done = (functools.reduce(jnp.maximum, [reach[i] for i in range(7, C, 8)]) <= RANGE) & (size >= 16)
    return jnp.where(done, 0, size >> 1)


def any_row(x: jax.Array) -> jax.Array:
    """A row of a tile [C, C] whose rows are the same bits, as a number per column.

    No exchange between threads: each has its own row. Were the rows equal but for rounding, so would be
    the result of two runs.
    """
    if interpreted.value:
        return x[0]

    @plgpu.inline_mgpu(
        arg_types=(blocks.WGMMA,), return_type=plgpu.ShapeDtypeStruct((C,), x.dtype, layout=blocks.COLS)
    )
    def take(_: Any, tile: Any) -> Any:
        layout = blocks.COLS.to_mgpu()
        first = tile.registers[0, :, 0, 0, 0].reshape(layout.registers_shape((C,)))
        return mgpu.FragmentedArray(_registers=first, _layout=layout, _is_signed=None)

    return take(x)
