"""The forward with the delta rule and a decay per key channel in one pass over chunks of 16 tokens.

A block of threads walks a sequence of one value head: three kinds of warpgroups, of which one copies
tiles of 64 tokens, one prepares their chunks a tile or two ahead and two hold S^T (64 values by K each). With
G the sums of log-decays from a chunk's start, C its last token,
    V' = A beta (V - (k exp G) S)      o = (q exp G) S + P V'
    S <- exp(G_C) (S + (k exp -G)^T V')
A = (I + L)^-1, L and P the products of k exp G and q exp G with k exp -G: one anchor a chunk, right while
no |G| exceeds `channel_math.RANGE`. From the first token on that does, or is hard (two_parts.py), results are
wrong; `first_wrong` says which it is.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math, one_pass_tiles, two_parts
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.chunk_math import sums_of_products
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_tiles import KEYS, QUERIES

BF16 = jnp.bfloat16
STATE, PREPARE, COPY = 152, 176, 24  # registers a thread: 65,536 in all, in steps of 8; no spills
STAGES = 2  # tiles
HOLDING, HALVES = 2, 2  # warpgroups with 64 values each; halves of the 128 channels
NEVER = 2.0**30
LEAST = channel_math.LEAST / blocks.LOG2E


class OnePassed(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S^T after the last token [B, HV, V, K] float32; None if not wanted.

    first_wrong: [B, HV, C] float32, the least of which is the token from which on the others are not to be
    used; `NEVER` if all are right.
    """

    o: jax.Array
    first_wrong: jax.Array
    final: Any = None


@dataclasses.dataclass(frozen=True)
class OnePass:
    """One compiled pass; final: also return the last states."""

    inputs: Inputs
    final: bool

    def __call__(self) -> OnePassed:
        i = self.inputs
        batch, length, heads, value_heads, key_dim, value_dim = i.sizes
        assert key_dim == value_dim == HALVES * C and i.beta is not None
        assert i.log_decay is not None and i.log_decay.dtype == BF16
        arrays = dict(q=i.q, k=i.k, v=i.v, g=i.log_decay, beta=i.beta, initial=i.state)
        state = jax.ShapeDtypeStruct((batch, value_heads, value_dim, key_dim), F32)
        results = dict(
            o=jax.ShapeDtypeStruct(i.v.shape, BF16),
            first_wrong=jax.ShapeDtypeStruct((batch, value_heads, C), F32),
            final=state if self.final else None,
        )
        tiles = STAGES, HALVES, C, C
        scratch = dict(
            qk=blocks.smem((STAGES, HALVES, 2 * C, C), BF16),  # k, below it q; then stacked
            v=blocks.smem(tiles, BF16),
            g=blocks.smem(tiles, BF16),
            inverses=blocks.smem(tiles, BF16, width=ROWS),  # k exp -G
            carry=plgpu.SMEM((STAGES, C // ROWS, key_dim), F32),
            pairs=one_pass_tiles.pairs(STAGES),
            beta=plgpu.SMEM((STAGES, C), F32),
            diagonal=plgpu.SMEM((C,), F32),
            o=blocks.smem((HOLDING, C, C), BF16),
            filled=plgpu.Barrier(num_arrivals=4 * HALVES + 1, num_barriers=STAGES),
            ready=plgpu.Barrier(num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=HOLDING, num_barriers=STAGES),
            done=plgpu.Barrier(num_arrivals=HOLDING + 2),
        )

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            b, head, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
            at = SimpleNamespace(refs=SimpleNamespace(**refs), smem=SimpleNamespace(**smem), b=b, head=head)
            at.count, at.key_head = length // C, blocks.div(head, value_heads // heads)
            blocks.role(wg < HOLDING, lambda: self.hold_state(at, wg), increase=STATE)
            blocks.role(wg == HOLDING, lambda: self.prepare_tiles(at), increase=PREPARE)
            blocks.role(wg == HOLDING + 1, lambda: self.issue_copies(at), decrease=COPY)
            blocks.finish_together(at.smem.done)

        out = blocks.launch(
            "delta_channel_one_pass", body, arrays, results, scratch, dict(b=batch, h=value_heads),
            threads=HOLDING + 2, interpret=i.interpret,
        )  # fmt: skip
        return OnePassed(**out)

    def issue_copies(self, at: SimpleNamespace) -> None:
        smem, refs = at.smem, at.refs

        def fill(n: Any, slot: Any) -> None:
            rows, barrier = pl.ds(n * C, C), smem.filled.at[slot]
            for half in range(HALVES):
                columns = pl.ds(half * C, C)
                raw = smem.qk.at[slot, half]
                copies = (
                    (refs.g, at.head, smem.g.at[slot, half]),
                    (refs.k, at.key_head, raw.at[pl.ds(0, C)]),
                    (refs.q, at.key_head, raw.at[pl.ds(C, C)]),
                    (refs.v, at.head, smem.v.at[slot, half]),
                )
                for source, head, tile in copies:
                    plgpu.copy_gmem_to_smem(source.at[at.b, rows, head, columns], tile, barrier)
            plgpu.copy_gmem_to_smem(refs.beta.at[at.b, at.head, rows], smem.beta.at[slot], barrier)

        blocks.refill(fill, smem.free, at.count, STAGES)

    def prepare_tiles(self, at: SimpleNamespace) -> None:
        smem = at.smem

        def step(n: Any, first: jax.Array) -> jax.Array:
            slot = blocks.rem(n, STAGES)
            plgpu.barrier_wait(smem.filled.at[slot])
            wrong = self.prepare_tile(at, slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.ready.at[slot])
            token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS) + n * C
            return jnp.minimum(first, jnp.where(wrong, token.astype(F32), NEVER))

        never = plgpu.layout_cast(jnp.full((C,), NEVER, F32), blocks.ROWS)
        at.refs.first_wrong.at[at.b, at.head][...] = lax.fori_loop(0, at.count, step, never)

    def prepare_tile(self, at: SimpleNamespace, slot: Any) -> jax.Array:
        """Which tokens are beyond what one anchor can do, or hard."""
        i, smem = self.inputs, at.smem
        store = functools.partial(blocks.store, interpret=i.interpret)
        beta = smem.beta.at[slot]
        raw = lambda which, half: smem.qk.at[slot, half].at[pl.ds(which * C, C)]
        stacked = KEYS, QUERIES
        squares: list[Any] = [0.0, 0.0]
        diagonal: Any = 0.0
        for half in range(HALVES):
            g = smem.g.at[slot, half]
            store(g, jnp.maximum(blocks.tile(g, BF16), jnp.asarray(LEAST, BF16)))
            tiles = [blocks.tile(raw(which, half)) for which in stacked]
            for which, x in enumerate(tiles if i.l2norm else tiles[:1]):
                squares[which] += jnp.sum(x * x, axis=1)
            diagonal += jnp.sum(tiles[KEYS] * tiles[QUERIES], axis=1)
        norms: list[Any] = [lax.rsqrt(x + blocks.L2NORM_EPS) if i.l2norm else None for x in squares]

        def normal(x: jax.Array, which: int) -> jax.Array:
            x = x.astype(F32)
            return x * blocks.by_row(norms[which]) if i.l2norm else x

        if i.l2norm:
            diagonal *= norms[KEYS] * norms[QUERIES]
        smem.diagonal[...] = diagonal * i.scale  # not of rounded factors: where gates are steep, most of o
        plgpu.commit_smem()
        size = blocks.row_vector(beta) * (1.0 if i.l2norm else squares[KEYS])
        wrong = size > two_parts.LARGEST
        for half in range(HALVES):
            total = blocks.matmul((self.within(beta), smem.g.at[slot, half]), interpret=i.interpret)
            total *= blocks.LOG2E
            rows = [blocks.tile(raw(which, half), BF16) for which in stacked]
            wrong = wrong | (jnp.min(total, axis=1) < -channel_math.RANGE)
            plgpu.commit_smem()  # all have read what is overwritten now
            grown = normal(rows[KEYS], KEYS) * jnp.exp2(jnp.minimum(-total, channel_math.RANGE))
            store(smem.inverses.at[slot, half], grown.astype(BF16), width=ROWS)
            decay = jnp.exp2(total)
            ends = smem.carry.at[slot, :, pl.ds(half * C, C)]
            one_pass_tiles.last_rows(ends, decay, interpret=i.interpret)
            for which in stacked:
                x = normal(rows[which], which) * decay * (i.scale if which == QUERIES else 1.0)
                one_pass_tiles.stack(smem.qk.at[slot, half], x.astype(BF16), which, interpret=i.interpret)
        plgpu.commit_smem()
        factors = smem.qk.at[slot], smem.inverses.at[slot], beta, smem.diagonal
        one_pass_tiles.store_pairs(*factors, smem.pairs.at[slot], interpret=i.interpret)
        return wrong

    def within(self, beta: Any) -> jax.Array:
        """Row i sums the tokens t <= i of its chunk."""
        row, col = blocks.row_index(), blocks.col_index()
        row = row + jnp.where(beta[0] > 1e38, 1, 0)  # a zero that the compiler cannot know: channel_math
        return jnp.where((col <= row) & (col >= (row & -ROWS)), 1.0, 0.0).astype(BF16)

    def hold_state(self, at: SimpleNamespace, wg: Any) -> None:
        i, smem, refs = self.inputs, at.smem, at.refs
        columns = pl.ds(wg * C, C)
        halves = [(at.head, columns, pl.ds(half * C, C)) for half in range(HALVES)]
        initial = getattr(refs, "initial", None)
        state = tuple(blocks.state(initial, (C, C), (at.b, *half)) for half in halves)

        def step(n: Any, state: tuple) -> tuple:
            slot = blocks.rem(n, STAGES)
            plgpu.barrier_wait(smem.filled.at[slot])
            plgpu.barrier_wait(smem.ready.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(C // ROWS):
                state = self.advance(at, wg, slot, chunk, state)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.free.at[slot])
            rows = pl.ds(n * C, C)
            plgpu.copy_smem_to_gmem(smem.o.at[wg], refs.o.at[at.b, rows, at.head, columns])
            return state

        state = lax.fori_loop(0, at.count, step, state)
        if self.final:
            for half, part in zip(halves, state, strict=True):
                blocks.write(refs.final.at[at.b, *half], part, interpret=i.interpret)
        plgpu.wait_smem_to_gmem(0)

    def advance(self, at: SimpleNamespace, wg: Any, slot: Any, chunk: int, state: tuple) -> tuple:
        """The state after a chunk, whose outputs go to shared memory."""
        i, smem = self.inputs, at.smem
        tokens = pl.ds(chunk * ROWS, ROWS)
        stacked = [smem.qk.at[slot, half].at[pl.ds(2 * chunk * ROWS, 2 * ROWS)].T for half in range(HALVES)]
        pairs = list(zip((part.astype(BF16) for part in state), stacked, strict=True))
        (read,) = sums_of_products((pairs, (C, 2 * ROWS)), interpret=i.interpret)
        value = blocks.tile(smem.v.at[slot, wg].at[tokens].T)
        beta = blocks.by_col(blocks.col_vector(smem.beta.at[slot].at[tokens]), (C, ROWS))
        values, o = one_pass_tiles.finish(
            read, value, beta, smem.pairs.at[slot, chunk], interpret=i.interpret
        )
        keys = [smem.inverses.at[slot, half].at[tokens] for half in range(HALVES)]
        sums = [([(values, key)], part) for key, part in zip(keys, state, strict=True)]
        state = sums_of_products(*sums, interpret=i.interpret)
        blocks.store(smem.o.at[wg].at[tokens], o, interpret=i.interpret, transposed=True)
        carry = smem.carry.at[slot, chunk]
        return tuple(
            part * blocks.by_col(blocks.col_vector(carry.at[pl.ds(half * C, C)]))
            for half, part in enumerate(state)
        )
