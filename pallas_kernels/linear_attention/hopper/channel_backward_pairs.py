"""Pairs of tokens in the gradients with a decay per key channel: E and F, and what they give to q and k.

See channel_backward_chunks.py for the formulas, channel_backward_copies.py for the buffers.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.channel_backward_copies import F16, HALF
from pallas_kernels.linear_attention.hopper.channel_tiles import NORM_K, NORM_Q

TILE, HALF_TILE = (C, C), (C, HALF)


class Pairs:
    """A warpgroup at work on the channels [wg C, wg C + C) of a chunk; refs, s: arrays and buffers by name.

    What works on a chunk sets i, its number in the block of threads, slot, norms and seen_by.
    """

    i: Any
    slot: Any
    norms: Any
    seen_by: int

    def __init__(self, refs: dict[str, Any], s: dict[str, Any], at: SimpleNamespace) -> None:
        self.refs, self.s, self.at = refs, s, at
        self.store, self.multiply = blocks.store, blocks.sums_of_products
        self.sync = lambda: blocks.meet(s["both"])

    # What the next steps name. The 0 in it is unknown to the compiler and new each time: else it lifts the
    # addresses, descriptors and masks of a whole chunk to its start, and spills.

    def zero(self) -> jax.Array:
        self.seen_by += 1
        return jnp.minimum(self.norms[NORM_K, self.seen_by % C].astype(jnp.int32), 0)

    def own(self, name: str, *place: Any) -> Any:
        """The part of a buffer that has this warpgroup's channels."""
        return self.s[name].at[(*place, self.at.wg + self.zero())]

    def by_token(self, ref: Any) -> jax.Array:
        return blocks.by_col(blocks.col_vector(ref), TILE)

    def own_pairs(self) -> list:
        return [self.at.wg] if self.at.workers == 2 else [jnp.int32(0), jnp.int32(1)]

    def steps(self) -> jax.Array:
        """Log-decays in base 2, float16, [channel, token]."""
        if self.at.direct:
            return blocks.tile(self.own("decay", 0).T, F16)
        if self.at.half:
            return lax.bitcast_convert_type(blocks.tile(self.own("decay", self.slot).T, BF16), F16)
        return channel_math.steps(blocks.tile(self.own("decay", self.slot).T))

    def offsets(self, steps: jax.Array, level: Any) -> tuple:
        """The product for sums of log-decays from the middle of a token's block to it."""
        return [(steps, self.s["middle"].at[level + self.zero()].T)], TILE

    def raw_pairs(self, which: Any) -> jax.Array:
        """dO U^T (additive: for both parts), dV U^T."""
        over, zero = range(self.at.blocks_v), self.zero()
        d = self.s["d"].at[which + zero if self.at.delta else zero]
        products = [(d.at[j], self.s["u"].at[zero + j].T) for j in over]
        return self.multiply((products, TILE))[0]

    def store_pairs(self, which: Any, raw: jax.Array) -> None:
        """E' (first), F' strictly below the diagonal; the diagonal apart. Additive: the two parts of E'."""
        s, at = self.s, self.at
        row, col = blocks.row_index() + self.zero(), blocks.col_index()
        second = which.astype(F32)
        norm_q, norm_k = (blocks.row_vector(self.norms.at[name]) for name in (NORM_Q, NORM_K))
        of_row = norm_q if not at.delta else norm_q + second * (-norm_k - norm_q)
        diagonal = jnp.sum(jnp.where(row == col, raw, 0.0), axis=1)
        s["rows"].at[which][...] = diagonal * jnp.where(which == 0, norm_q * norm_k, 1.0)
        keep = row > col
        if at.documents:
            ids = s["segment"].at[self.slot, 0]
            keep = keep & (blocks.by_row(blocks.row_vector(ids)) == self.by_token(ids))
        x = jnp.where(keep, raw * blocks.by_row(of_row) * self.by_token(self.norms.at[NORM_K]), 0.0)
        if not at.delta:
            x = x - rounded(x).astype(F32) * second
        self.store(s["pairs"].at[which], x.astype(BF16), width=HALF)

    def halve(self, size: Any) -> None:
        """E and F without the pairs, `middle` for blocks of `size` tokens."""
        row, col = blocks.row_index() + self.zero(), blocks.col_index()
        for which in self.own_pairs():
            ref = self.s["pairs"].at[which]
            left = jnp.where((row ^ col) < size, blocks.tile(ref), 0.0).astype(BF16)
            self.store(ref, left, width=HALF)
        middle = self.s["middle"].at[1]
        pl.when(self.at.wg == 0)(lambda: self.store(middle, channel_math.middle_of(row, col, size)))
        plgpu.commit_smem()

    def half(self, name: str, half: int, dtype: Any = F32) -> jax.Array:
        """q or k of half of the tokens, [channel, token]."""
        return blocks.tile(self.own(name).at[pl.ds(half * HALF, HALF)].T, dtype)

    def level(self, span: Any, carried: tuple) -> tuple:
        """The pairs across the middles of blocks of some size, or (finest) all that are left in them."""
        size, (dq, dk_row, dk_col) = carried
        delta, finer = self.at.delta, (size < C).astype(jnp.int32)
        offset = halves(self.multiply(self.offsets(self.steps(), finer))[0])
        finest = (size == span) & (size > 2)  # blocks of 2 have one pair
        late = [((col + self.zero()) & (size >> 1)) != 0 for col in halves(blocks.col_index())]
        up = lambda i: jnp.exp2(jnp.where(finest | late[i], pinned(offset[i]), -jnp.inf))
        down = lambda i: jnp.exp2(jnp.where(finest | ~late[i], pinned(offset[i]) * -1.0, -jnp.inf))

        def operands(parts: list, which: int, i: int, j: int, transposed: bool) -> list:
            """A tile in two parts times E or F of tokens of halves i and j; additive: the two parts of E."""
            at = [pl.ds(half * HALF, HALF) for half in (i, j)]

            def pair(n: int) -> Any:
                ref = self.s["pairs"].at[n + self.zero(), *at]
                return ref.T if transposed else ref

            if delta:
                return [(x, pair(which)) for x in parts]
            return [(parts[0], pair(0)), (parts[1], pair(0)), (parts[0], pair(1))]

        def row(i: int, tiles: list, which: int) -> tuple:
            """The product for tokens of half i as rows of E or F: tokens before them as columns."""
            return [x for j in range(i + 1) for x in operands(tiles[j], which, i, j, True)], HALF_TILE

        def column(j: int, tiles: list, which: int) -> list:
            return [x for i in range(j, 2) for x in operands(tiles[i], which, i, j, False)]

        k_down: list = []
        dq, dk_row, dk_col = list(dq), list(dk_row), list(dk_col)
        for i in (0, 1):
            k_down.append(two_parts(self.half("k", i) * down(i)))
            found = self.multiply(*[row(i, k_down, which) for which in range(1 + delta)])
            dq[i] = pinned(dq[i] + up(i) * found[0])
            if delta:
                dk_row[i] = pinned(dk_row[i] + up(i) * found[1])
        q_up: list = [None, None]
        k_up: list = [None, None]
        for j in (1, 0):
            q_up[j] = two_parts(self.half("q", j) * up(j))
            (read,) = self.multiply((column(j, q_up, 0), HALF_TILE))
            if delta:
                k_up[j] = two_parts(self.half("k", j) * up(j))
                (read,) = self.multiply((column(j, k_up, 1), read))
            dk_col[j] = pinned(dk_col[j] + down(j) * read)

        @pl.when(~finest & (size > 2))
        def _() -> None:  # only pairs within half a block are left
            self.sync()
            self.halve(size >> 1)
            self.sync()

        return size >> 1, (tuple(dq), tuple(dk_row), tuple(dk_col))


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second half of the tokens of a tile [channel, token]."""
    return x[:, :HALF], x[:, HALF:]


def pinned(x: Any) -> Any:
    """x, which the compiler makes here and of which it forgets the origin: else it makes sums where they are
    used and keeps their summands, or keeps both a factor and its inverse."""
    return lax.optimization_barrier(x)


def rounded(x: jax.Array) -> jax.Array:
    """bf16 pairs; pinned, a way back to float32 does not become a slow conversion of each."""
    return pinned(x.astype(BF16))


def two_parts(x: jax.Array) -> list[jax.Array]:
    """x as the sum of two bf16 tiles."""
    high = rounded(x)
    return [high, (x - high.astype(F32)).astype(BF16)]
