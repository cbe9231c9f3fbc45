"""Products of 16 bits where 8 would be felt: A, its operands and V' as sums of two bf16.

A token whose beta |k|^2 is above 1 turns round what the state has along its key. Where the keys that follow
are alike, A X and K^T V' then are sums of alternating signs that cancel, and rounding either operand to bf16
is felt by tens of percent. Tokens from a chunk's first such token on are `hard`, and so is the chunk: its A
has a second part, written and read only there, and the scans branch, all threads alike. With normalised keys
and beta in [0, 1] no token is hard, and nothing is computed otherwise than without this.

Hard is said of tokens, by what came before them: so outputs do not depend on later tokens, in no bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, inverse
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs

LARGEST = 1.01  # beta |k|^2 of an ordinary token: 1, and what rounding may add


class Inverse(NamedTuple):
    """A - I of every chunk, A = (I + L)^-1, row i of a chunk's at token i.

    high: rounded to bf16 [B, HV, T, C].  low: what that took off from the rows of hard tokens, bf16
    [B, HV, T, C], undefined in chunks without any.  hard: the number of hard tokens, the last so many of the
    chunk, the same C times, [B, HV, T/C, C] float32.
    """

    high: Any
    low: Any
    hard: Any


def result(batch: int, value_heads: int, length: int) -> Inverse:
    square = jax.ShapeDtypeStruct((batch, value_heads, length, C), BF16)
    return Inverse(square, square, jax.ShapeDtypeStruct((batch, value_heads, length // C, C), F32))


def named(inverses: Inverse | None) -> dict[str, Any]:
    """The arrays by the names that they have among a kernel's; None where there are none."""
    return dict.fromkeys(Inverse._fields) if inverses is None else inverses._asdict()


def scratch() -> dict[str, Any]:
    """The shared memory of `find_hard` and `store_inverse`, but the tiles."""
    return dict(exchange=inverse.exchange(), hard=plgpu.SMEM((2, C), F32))


def find_hard(inputs: Inputs, beta: Any, keys: list, scratch: dict[str, Any]) -> None:
    """Counts a chunk's hard tokens for `store_inverse`; beta: its numbers, keys: its tiles of 64 channels."""
    squares_s, hard_s = scratch["hard"].at[0], scratch["hard"].at[1]
    size = blocks.col_vector(beta)
    if not inputs.l2norm:
        tiles = [blocks.tile(key) for key in keys]
        squares_s[...] = functools.reduce(jnp.add, [jnp.sum(x * x, axis=1) for x in tiles])
        plgpu.commit_smem()
        size *= blocks.col_vector(squares_s)
    left = (C - blocks.col_index()).astype(F32)  # of the chunk, from each token on
    hard_s[...] = jnp.max(jnp.where(blocks.by_col(size) > LARGEST, left, 0.0), axis=1)


def store_inverse(
    lower: jax.Array, high_s: Any, low_s: Any, scratch: dict[str, Any], refs: dict[str, Any], at: tuple
) -> None:
    """Inverts I + L, L the part of `lower` [C, C] below the diagonal, and starts the copies to `refs`.

    high_s, low_s: tiles [C, C] that nobody reads any more.  refs: by name, those of `Inverse` among others.
    at: sequence, head, chunk.
    """
    b, head, n = at
    rows, hard_s = pl.ds(n * C, C), scratch["hard"].at[1]
    high, low = inverse.unit_lower_inverse(lower, scratch["exchange"])  # with barriers
    blocks.store(high_s, high)
    ordinary = C - hard_s[0].astype(jnp.int32)
    token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS)
    late = blocks.by_row(jnp.where(token >= ordinary, 1.0, 0.0))
    blocks.store(low_s, (low.astype(F32) * late).astype(BF16))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(high_s, refs["high"].at[b, head, rows])
    plgpu.copy_smem_to_gmem(hard_s, refs["hard"].at[b, head, n])

    @pl.when(hard_s[0] > 0.0)
    def _() -> None:
        plgpu.copy_smem_to_gmem(low_s, refs["low"].at[b, head, rows])


def split(x: jax.Array, parts: int, hard: Any = None, room: Any = None) -> list[Any]:
    """x [C, C] float32 as a sum of one or two bf16, in registers; the second in `room`, a tile, if given.

    hard: `Inverse.hard`, only those tokens, by column, are of two parts; None: all.
    """
    high = lax.optimization_barrier(x.astype(BF16))  # at once: what has been rounded frees its registers
    if parts == 1:
        return [high]
    rest = x - high.astype(F32)
    if hard is not None:
        rest = jnp.where(blocks.col_index() >= C - hard.astype(jnp.int32), rest, 0.0)
    rest = rest.astype(BF16)
    if room is None:
        return [high, rest]
    blocks.store(room, rest)
    plgpu.commit_smem()
    return [high, room]


def hidden_zero(hard: jax.Array) -> jax.Array:
    """0, which the compiler cannot know, of a number in `Inverse.hard`: added to an index it keeps addresses
    from being hoisted out of a loop over chunks into registers, those of both branches."""
    return (hard * 2.0**-10).astype(jnp.int32)


def loop(
    count: Any,
    step: Callable[..., jax.Array],
    state: jax.Array,
    hardness: Any,
    begin: Callable[..., tuple] = lambda n, state, hard: (state,),
    start: Any = 0,
) -> jax.Array:
    """state <- step(n, *begin(n, state, hard), parts, hard), n from start to count - 1: of two parts in hard
    chunks, else of one.

    hardness: n to the number in `Inverse.hard`; None: none is hard. A step is a branch as a whole, so that an
    ordinary chunk's keeps no register for what a hard one's needs; `begin` is what both have in common.
    """
    if hardness is None:
        return lax.fori_loop(start, count, lambda n, state: step(n, *begin(n, state, None), 1, None), state)

    def either(n: Any, carried: tuple) -> tuple:
        state, hard = carried
        following = hardness(jnp.minimum(n + 1, count - 1))  # long before it is wanted
        begun = begin(n, state, hard)
        run = lambda parts: lambda: step(n, *begun, parts, hard)
        return lax.cond(hard > 0.0, run(2), run(1)), following

    return lax.fori_loop(start, count, either, (state, hardness(start)))[0]


def load_low(wanted: Any, source: Any, target: Any, ready: Any) -> None:
    """If `wanted`, starts the copy of A's second part into a tile from which results leave; see
    `times_inverse`."""

    @pl.when(wanted)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk left there has gone
        plgpu.copy_gmem_to_smem(source(), target, ready)


def times_inverse(
    x: jax.Array, high: Any, low: Any, ready: Any, parts: int, hard: Any = None, room: Any = None
) -> jax.Array:
    """x A, or x A^T with both tiles transposed; x, hard and room as in `split`."""
    operands = split(x, parts, hard, room)
    pairs = [(operands[0], high)]
    if parts == 2:
        plgpu.barrier_wait(ready)
        pairs += [(operands[1], high), (operands[0], low)]
    return blocks.sums_of_products((pairs, x))[0]


def add_rest(out: Any, x: Any, keys: Any, parts: int, rounded: Any = None) -> jax.Array:
    """out [C, C] and, of two parts, what rounding x [C, K] to bf16 took off, times keys^T.

    rounded: x in bf16 in shared memory, where there are no registers to keep it in.
    """
    for start in range(0, x.shape[1], C) if parts == 2 else ():  # not at once, for want of registers
        part, columns = x[:, start : start + C], pl.ds(start, C)
        high = part.astype(BF16).astype(F32) if rounded is None else blocks.tile(rounded.at[:, columns])
        rest = (part - high).astype(BF16)
        out = blocks.matmul((rest, keys.at[:, columns].T, out))
    return out


def products(*sums: Callable[[], tuple], parts: int) -> tuple[jax.Array, ...]:
    """`sums_of_products` of what `sums` return; of two parts one after the other, for want of registers."""
    if parts == 1:
        return blocks.sums_of_products(*(one() for one in sums))
    return tuple(blocks.sums_of_products(one())[0] for one in sums)
