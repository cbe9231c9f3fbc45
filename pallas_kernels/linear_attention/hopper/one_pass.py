"""The forward with the delta rule and a decay per key channel in one pass over chunks of 16 tokens.

A block of threads walks a run of a sequence of one value head: three kinds of warpgroups, of which one copies
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
from pallas_kernels.linear_attention.hopper.forward_scan import Wanted
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_tiles import KEYS, QUERIES

BF16 = jnp.bfloat16
STATE, PREPARE, COPY = 152, 176, 24  # registers a thread: 65,536 in all, in steps of 8; no spills
STAGES = 2  # tiles
HOLDING, HALVES = 2, 2  # warpgroups with 64 values each; halves of the 128 channels
NEVER = 2.0**30
LEAST = channel_math.LEAST / blocks.LOG2E


class OnePassed(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S^T after each run [B * pieces, HV, V, K] float32; None if not wanted.

    first_wrong: [B * pieces, HV, C] float32, the least of which is the token of the sequence from which on
    the others are not to be used; `NEVER` if all are right.
    """

    first_wrong: jax.Array
    o: Any = None
    final: Any = None


@dataclasses.dataclass(frozen=True)
class OnePass(Wanted):
    """One compiled pass; lead, and mode "transition": as of `ChannelScan`; mode "summary": final only."""

    inputs: Inputs
    lead: jax.Array | None = None

    def __call__(self) -> OnePassed:
        i = self.inputs
        batch, length, heads, value_heads, key_dim, value_dim = i.sizes
        assert key_dim == value_dim == HALVES * C and i.beta is not None
        assert i.log_decay is not None and i.log_decay.dtype == BF16
        chunks = length // C
        vectors = Vectors(i, ("beta",))
        output, transition = self.mode == "output", self.mode == "transition"
        arrays = dict(
            q=i.q if output else None,
            k=i.k,
            v=None if transition else i.v,
            g=i.log_decay,
            **vectors.named,
            initial=None if transition else i.state,
            walk=self.walk,
            lead=self.lead,
        )
        results = {
            name: shape
            for name, shape in self.results(
                (batch, length), value_heads, value_dim, key_dim, delta=True
            ).items()
            if name in ("o", "final")
        }
        results["first_wrong"] = jax.ShapeDtypeStruct((batch * self.pieces, value_heads, C), F32)
        tiles = STAGES, HALVES, C, C
        scratch = dict(
            qk=blocks.smem((STAGES, HALVES, 2 * C, C), BF16),  # k, below it q; then stacked
            v=None if transition else blocks.smem(tiles, BF16),
            g=blocks.smem(tiles, BF16),
            inverses=blocks.smem(tiles, BF16, width=ROWS),  # k exp -G
            carry=plgpu.SMEM((STAGES, C // ROWS, key_dim), F32),
            pairs=one_pass_tiles.pairs(STAGES),
            vectors=plgpu.SMEM((STAGES, len(vectors), C), F32),
            diagonal=plgpu.SMEM((C,), F32),
            o=blocks.smem((HOLDING, C, C), BF16),
            filled=plgpu.Barrier(
                num_arrivals=HALVES * (3 + output - transition) + len(vectors), num_barriers=STAGES
            ),
            ready=plgpu.Barrier(num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=HOLDING, num_barriers=STAGES),
            done=plgpu.Barrier(num_arrivals=HOLDING + 2),
        )

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            at = self.place(
                refs, smem, chunks, vectors=vectors, interpret=i.interpret,
                values=not transition,
            )  # fmt: skip
            at.key_head = blocks.div(at.head, value_heads // heads)
            if self.lead is not None:
                at.lead = at.refs.lead[at.piece, at.head]
                at.first, at.count = at.first - at.lead, at.count + at.lead
            wg = at.wg
            blocks.role(wg < HOLDING, lambda: self.hold_state(at, wg), increase=STATE)
            blocks.role(wg == HOLDING, lambda: self.prepare_tiles(at), increase=PREPARE)
            blocks.role(wg == HOLDING + 1, lambda: self.issue_copies(at), decrease=COPY)
            blocks.finish_together(at.smem.done)

        grid = dict(b=batch * self.pieces, h=value_heads, v=1)
        out = blocks.launch(
            "delta_channel_one_pass_" + self.mode, body, arrays, results, scratch, grid,
            threads=HOLDING + 2, interpret=i.interpret,
        )  # fmt: skip
        return OnePassed(**out)

    def issue_copies(self, at: SimpleNamespace) -> None:
        smem, refs = at.smem, at.refs

        def fill(n: Any, slot: Any) -> None:
            rows, barrier = pl.ds((at.first + n) * C, C), smem.filled.at[slot]
            for half in range(HALVES):
                columns = pl.ds(half * C, C)
                raw = smem.qk.at[slot, half]
                keys, queries = raw.at[pl.ds(0, C)], raw.at[pl.ds(C, C)]
                plgpu.copy_gmem_to_smem(
                    refs.g.at[at.b, rows, at.head, columns], smem.g.at[slot, half], barrier
                )
                plgpu.copy_gmem_to_smem(refs.k.at[at.b, rows, at.key_head, columns], keys, barrier)
                if at.output:
                    plgpu.copy_gmem_to_smem(refs.q.at[at.b, rows, at.key_head, columns], queries, barrier)
                if at.values:
                    values = refs.v.at[at.b, rows, at.head, columns]
                    plgpu.copy_gmem_to_smem(values, smem.v.at[slot, half], barrier)
            at.vectors.copy(vars(refs), smem.vectors.at[slot], barrier, at.b, at.head, rows)

        blocks.refill(fill, smem.free, at.count, STAGES)

    def prepare_tiles(self, at: SimpleNamespace) -> None:
        smem = at.smem

        def step(n: Any, first: jax.Array) -> jax.Array:
            slot = blocks.rem(n, STAGES)
            plgpu.barrier_wait(smem.filled.at[slot])
            wrong = self.prepare_tile(at, slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.ready.at[slot])
            token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS) + (at.first + n) * C
            return jnp.minimum(first, jnp.where(wrong, token.astype(F32), NEVER))

        never = plgpu.layout_cast(jnp.full((C,), NEVER, F32), blocks.ROWS)
        at.refs.first_wrong.at[at.piece, at.head][...] = lax.fori_loop(0, at.count, step, never)

    def prepare_tile(self, at: SimpleNamespace, slot: Any) -> jax.Array:
        """Which tokens are beyond what one anchor can do, or hard."""
        i, smem = self.inputs, at.smem
        store = functools.partial(blocks.store, interpret=i.interpret)
        beta = at.vectors.get("beta", smem.vectors.at[slot])
        raw = lambda which, half: smem.qk.at[slot, half].at[pl.ds(which * C, C)]
        stacked = (KEYS, QUERIES) if at.output else (KEYS,)
        squares: list[Any] = [0.0, 0.0]
        diagonal: Any = 0.0
        for half in range(HALVES):
            g = smem.g.at[slot, half]
            store(g, jnp.maximum(blocks.tile(g, BF16), jnp.asarray(LEAST, BF16)))
            tiles = [blocks.tile(raw(which, half)) for which in stacked]
            for which, x in enumerate(tiles if i.l2norm else tiles[:1]):
                squares[which] += jnp.sum(x * x, axis=1)
            if at.output:
                diagonal += jnp.sum(tiles[KEYS] * tiles[QUERIES], axis=1)
        norms: list[Any] = [lax.rsqrt(x + blocks.L2NORM_EPS) if i.l2norm else None for x in squares]

        def normal(x: jax.Array, which: int) -> jax.Array:
            x = x.astype(F32)
            return x * blocks.by_row(norms[which]) if i.l2norm else x

        if at.output:  # the largest scores where gates are steep: not of rounded factors
            if i.l2norm:
                diagonal *= norms[KEYS] * norms[QUERIES]
            smem.diagonal[...] = diagonal * i.scale
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
        initial = getattr(refs, "initial", None)
        halves = [pl.ds(half * C, C) for half in range(HALVES)]

        def load(row: Any) -> tuple:
            if not at.values:
                index = blocks.row_index() + wg * C, blocks.col_index()
                return tuple(jnp.where(index[0] == index[1] + half * C, 1.0, 0.0) for half in range(HALVES))
            return tuple(blocks.state(initial, (C, C), (row, at.head, columns, half)) for half in halves)

        if self.lead is not None and initial is not None:
            empty = lambda: (blocks.zeros((C, C)),) * HALVES
            state = lax.cond(at.first == 0, lambda: load(at.b), empty)
        else:
            state = load(at.piece)

        def step(n: Any, state: tuple, output: bool) -> tuple:
            slot = blocks.rem(n, STAGES)
            plgpu.barrier_wait(smem.filled.at[slot])
            plgpu.barrier_wait(smem.ready.at[slot])
            if output:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(C // ROWS):
                state = self.advance(at, wg, slot, chunk, state, output)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.free.at[slot])
            if output:
                rows = pl.ds((at.first + n) * C, C)
                plgpu.copy_smem_to_gmem(smem.o.at[wg], refs.o.at[at.b, rows, at.head, columns])
            return state

        start: Any = 0
        if self.lead is not None:
            start = at.lead
            state = lax.fori_loop(0, start, lambda n, state: step(n, state, False), state)
        state = lax.fori_loop(start, at.count, lambda n, state: step(n, state, at.output), state)
        if self.final or not at.output:
            for half, part in zip(halves, state, strict=True):
                blocks.write(refs.final.at[at.piece, at.head, columns, half], part, interpret=i.interpret)
        plgpu.wait_smem_to_gmem(0)

    def advance(
        self, at: SimpleNamespace, wg: Any, slot: Any, chunk: int, state: tuple, output: bool
    ) -> tuple:
        i, smem = self.inputs, at.smem
        tokens = pl.ds(chunk * ROWS, ROWS)
        stacked = [smem.qk.at[slot, half].at[pl.ds(2 * chunk * ROWS, 2 * ROWS)].T for half in range(HALVES)]
        pairs = list(zip((part.astype(BF16) for part in state), stacked, strict=True))
        (read,) = sums_of_products((pairs, (C, 2 * ROWS)), interpret=i.interpret)
        value = blocks.zeros((C, ROWS))
        if at.values:
            value = blocks.tile(smem.v.at[slot, wg].at[tokens].T)
        beta = at.vectors.get("beta", smem.vectors.at[slot]).at[tokens]
        beta = blocks.by_col(blocks.col_vector(beta), (C, ROWS))
        values, o = one_pass_tiles.finish(
            read, value, beta, smem.pairs.at[slot, chunk], interpret=i.interpret
        )
        keys = [smem.inverses.at[slot, half].at[tokens] for half in range(HALVES)]
        sums = [([(values, key)], part) for key, part in zip(keys, state, strict=True)]
        state = sums_of_products(*sums, interpret=i.interpret)
        if output:
            blocks.store(smem.o.at[wg].at[tokens], o, interpret=i.interpret, transposed=True)
        carry = smem.carry.at[slot, chunk]
        return tuple(
            part * blocks.by_col(blocks.col_vector(carry.at[pl.ds(half * C, C)]))
            for half, part in enumerate(state)
        )
