"""The forward with the delta rule and a decay per key channel in one pass over chunks of 16 tokens.

A block of threads walks a sequence of one value head: two warpgroups copy and prepare
(one_pass_prepare.py) every other tile of 64 tokens, a tile or two ahead, and two hold S^T (64 values by K
each). With G the sums of log-decays from a chunk's start, C its last token,
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

from pallas_kernels.linear_attention.hopper import blocks, one_pass_tiles, two_parts
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.chunk_math import sums_of_products
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_prepare import RANGE, Tile, prepare

BF16 = jnp.bfloat16
STATE, PREPARE = 152, 104  # registers a thread: 65,536 in all, in steps of 8; no spills
STAGES, AHEAD = 3, 2  # tiles of keys, of values
HOLDING, PREPARING = 2, 2  # warpgroups: with 64 values each; with every other tile each
TURNS = STAGES * PREPARING  # a place, and who prepares in it: each waits at every phase of a barrier
HALVES = 2  # of the 128 channels
NEVER = 2.0**30


class OnePassed(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S^T after the last token [B, HV, V, K] float32; None if not wanted.

    first_wrong: [B, HV, 2 C] float32, the least of which is the token from which on the others are
    not to be used; `NEVER` if all are right.
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
            first_wrong=jax.ShapeDtypeStruct((batch, value_heads, PREPARING * C), F32),
            final=state if self.final else None,
        )
        keys = STAGES, C, HALVES * C
        scratch = dict(
            qk=blocks.smem((STAGES, 2 * C, HALVES * C), BF16),  # of each chunk k, then q
            g=blocks.smem(keys, BF16, width=ROWS),  # then k exp -G
            v=blocks.smem((HOLDING, AHEAD, C, C), BF16),
            carry=plgpu.SMEM((STAGES, C // ROWS, key_dim), F32),
            pairs=one_pass_tiles.pairs(STAGES),
            beta=plgpu.SMEM((STAGES, C), F32),
            o=blocks.smem((HOLDING, C, C), BF16),
            filled=plgpu.Barrier(num_arrivals=2 * (C // ROWS) + 2, num_barriers=TURNS),
            values=plgpu.Barrier(num_barriers=HOLDING * AHEAD),
            ready=plgpu.Barrier(num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=HOLDING, num_barriers=TURNS),
            done=plgpu.Barrier(num_arrivals=HOLDING + PREPARING),
        )

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            b, head, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
            at = SimpleNamespace(refs=SimpleNamespace(**refs), smem=SimpleNamespace(**smem), b=b, head=head)
            at.count, at.key_head = length // C, blocks.div(head, value_heads // heads)
            blocks.role(wg < HOLDING, lambda: self.hold_state(at, wg), increase=STATE)
            blocks.role(wg >= HOLDING, lambda: self.prepare_tiles(at, wg - HOLDING), decrease=PREPARE)
            blocks.finish_together(at.smem.done)

        out = blocks.launch(
            "delta_channel_one_pass", body, arrays, results, scratch, dict(b=batch, h=value_heads),
            threads=HOLDING + PREPARING, interpret=i.interpret,
        )  # fmt: skip
        return OnePassed(**out)

    def copy_keys(self, at: SimpleNamespace, n: Any, slot: Any) -> None:
        smem, refs = at.smem, at.refs
        barrier = smem.filled.at[blocks.rem(n, TURNS)]

        self.wait_for_room(at, n)
        for chunk in range(C // ROWS):
            for which, source in enumerate((refs.k, refs.q)):
                source = source.at[at.b, pl.ds(n * C + chunk * ROWS, ROWS), at.key_head]
                target = smem.qk.at[slot, pl.ds((2 * chunk + which) * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(source, target, barrier)
        rows = pl.ds(n * C, C)
        plgpu.copy_gmem_to_smem(refs.g.at[at.b, rows, at.head], smem.g.at[slot], barrier)
        plgpu.copy_gmem_to_smem(refs.beta.at[at.b, at.head, rows], smem.beta.at[slot], barrier)

    def wait_for_room(self, at: SimpleNamespace, n: Any) -> None:
        """Until the tile that was in a tile's place has been used."""

        @pl.when(n >= STAGES)
        def _() -> None:
            plgpu.barrier_wait(at.smem.free.at[blocks.rem(n - STAGES, TURNS)])

    def prepare_tiles(self, at: SimpleNamespace, first_tile: Any) -> None:
        i, smem = self.inputs, at.smem

        def step(again: Any, first: jax.Array) -> jax.Array:
            n = again * PREPARING + first_tile
            slot, turn = blocks.rem(n, STAGES), blocks.rem(n, TURNS)
            self.copy_keys(at, n, slot)
            plgpu.barrier_wait(smem.filled.at[turn])
            tile = Tile(*(getattr(smem, name).at[slot] for name in Tile._fields))
            least, size = prepare(tile, l2norm=i.l2norm, scale=i.scale, interpret=i.interpret)
            wrong = (least < -RANGE) | (size > two_parts.LARGEST)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.ready.at[slot])
            token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS) + n * C
            return jnp.minimum(first, jnp.where(wrong, token.astype(F32), NEVER))

        never = plgpu.layout_cast(jnp.full((C,), NEVER, F32), blocks.ROWS)
        count = blocks.div(at.count - first_tile + PREPARING - 1, PREPARING)
        wrong = lax.fori_loop(0, count, step, never)
        at.refs.first_wrong.at[at.b, at.head, pl.ds(first_tile * C, C)][...] = wrong

        @pl.loop(count, count + -(-STAGES // PREPARING))
        def _(again: Any) -> None:
            n = again * PREPARING + first_tile
            pl.when(n < at.count + STAGES)(functools.partial(self.wait_for_room, at, n))

    def hold_state(self, at: SimpleNamespace, wg: Any) -> None:
        i, smem, refs = self.inputs, at.smem, at.refs
        columns = pl.ds(wg * C, C)
        halves = [(at.head, columns, pl.ds(half * C, C)) for half in range(HALVES)]
        initial = getattr(refs, "initial", None)
        state = tuple(blocks.state(initial, (C, C), (at.b, *half)) for half in halves)

        def fetch(n: Any, slot: Any) -> None:
            source = refs.v.at[at.b, pl.ds(n * C, C), at.head, columns]
            plgpu.copy_gmem_to_smem(source, smem.v.at[wg, slot], smem.values.at[AHEAD * wg + slot])

        for n in range(min(AHEAD, at.count)):
            fetch(n, n)

        def step(n: Any, state: tuple) -> tuple:
            slot, turn, own = blocks.rem(n, STAGES), blocks.rem(n, TURNS), blocks.rem(n, AHEAD)
            plgpu.barrier_wait(smem.values.at[AHEAD * wg + own])
            plgpu.barrier_wait(smem.filled.at[turn])
            plgpu.barrier_wait(smem.ready.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(C // ROWS):
                state = self.advance(at, wg, slot, own, chunk, state)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.free.at[turn])
            pl.when(n + AHEAD < at.count)(lambda: fetch(n + AHEAD, own))
            rows = pl.ds(n * C, C)
            plgpu.copy_smem_to_gmem(smem.o.at[wg], refs.o.at[at.b, rows, at.head, columns])
            return state

        state = lax.fori_loop(0, at.count, step, state)
        if self.final:
            for half, part in zip(halves, state, strict=True):
                blocks.write(refs.final.at[at.b, *half], part, interpret=i.interpret)
        plgpu.wait_smem_to_gmem(0)

    def advance(self, at: SimpleNamespace, wg: Any, slot: Any, own: Any, chunk: int, state: tuple) -> tuple:
        """The state after a chunk, whose outputs go to shared memory."""
        i, smem = self.inputs, at.smem
        tokens = pl.ds(chunk * ROWS, ROWS)
        parts = [pl.ds(half * C, C) for half in range(HALVES)]
        stacked = [smem.qk.at[slot].at[pl.ds(2 * chunk * ROWS, 2 * ROWS), part].T for part in parts]
        pairs = list(zip((part.astype(BF16) for part in state), stacked, strict=True))
        value = blocks.tile(smem.v.at[wg, own].at[tokens].T)
        beta = blocks.by_col(blocks.col_vector(smem.beta.at[slot].at[tokens]), (C, ROWS))
        (read,) = sums_of_products((pairs, (C, 2 * ROWS)), interpret=i.interpret)
        made = smem.pairs.at[slot, chunk]
        values = one_pass_tiles.values_of(read, value, beta, made, interpret=i.interpret)

        def finish() -> None:
            o = one_pass_tiles.outputs_of(read, values, made, interpret=i.interpret)
            blocks.store(smem.o.at[wg].at[tokens], o, interpret=i.interpret, transposed=True)

        carry = [blocks.col_vector(smem.carry.at[slot, chunk].at[part]) for part in parts]
        keys = [smem.g.at[slot].at[tokens, part] for part in parts]
        sums = [([(values, key)], part) for key, part in zip(keys, state, strict=True)]
        state = sums_of_products(*sums, interpret=i.interpret, meanwhile=finish)
        return tuple(part * blocks.by_col(factor) for part, factor in zip(state, carry, strict=True))
