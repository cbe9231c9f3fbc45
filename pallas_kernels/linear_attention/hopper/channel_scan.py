"""The scan over chunks for a decay per key channel: every operand is a tile that `channel_tiles` has made.

One block of threads per sequence (or piece of one), value head and slice of V. One or two warpgroups hold
S^T (64 values by K, float32, in registers) and run the chain of products; one issues the copies.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, forward_scan, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.channel_tiles import Tiles
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned, Wanted
from pallas_kernels.linear_attention.hopper.inputs import Inputs, fetch, fetch_values

REGISTERS = 232, 40  # of a thread that holds state, that copies


@dataclasses.dataclass(frozen=True)
class ChannelScan(Wanted):
    """One compiled scan; mode "transition" too: what each piece does to the state, from its identity.

    lead: None or the chunks before each piece that it walks before it: `warm_up.leads`; the state in `inputs`
    is then that before the first piece.
    """

    inputs: Inputs
    tiles: Tiles
    value_tile: int
    lead: jax.Array | None = None

    def __call__(self) -> Scanned:
        i, tiles = self.inputs, self.tiles
        batch, length, value_heads, key_dim = tiles.write.shape
        output, transition = self.mode == "output", self.mode == "transition"
        delta, values = tiles.inverses is not None, not transition
        value_dim = key_dim if transition else i.v.shape[3]
        slices = self.value_tile // C  # warpgroups that hold state
        chunks = length // C

        arrays = dict(
            read_q=tiles.read_q if output else None,
            read_k=tiles.read_k,
            write=tiles.write,
            scores=tiles.scores if output else None,
            **two_parts.named(tiles.inverses),
            v=i.v if values else None,
            carry=tiles.carry,
            beta=i.beta,
            initial=None if transition else i.state,
            walk=self.walk,
            lead=self.lead,
        )
        results = self.results((batch, length), value_heads, value_dim, key_dim, delta=delta)
        keys, square, slice_ = (C, key_dim), (C, C), (slices, C, C)
        stage = dict(read_q=keys, read_k=keys, write=keys, scores=square, high=square, v=slice_)
        stage = {name: shape for name, shape in stage.items() if arrays[name] is not None}
        outgoing = dict(o=slice_, states=(slices, C, key_dim), values=slice_)
        sent = lambda name: name == "o" or results[name] is not None  # o also takes A's second part
        outgoing = {name: shape for name, shape in outgoing.items() if sent(name)}
        bytes_of = lambda shapes: 2 * sum(map(math.prod, shapes.values()))
        each = bytes_of(stage) + 4 * (key_dim + C * delta)
        stages = self.stages(chunks, each, bytes_of(outgoing) + 1024)
        scratch = {name: blocks.smem((stages, *shape), BF16) for name, shape in stage.items()}
        scratch |= {name: blocks.smem(shape, BF16) for name, shape in outgoing.items()}
        scratch |= dict(
            carry=plgpu.SMEM((stages, key_dim), F32),
            filled=plgpu.Barrier(
                num_arrivals=len(stage) + 1 + delta + values * (slices - 1), num_barriers=stages
            ),
            free=plgpu.Barrier(num_arrivals=slices, num_barriers=stages),
        )
        if delta:
            scratch |= dict(beta=plgpu.SMEM((stages, C), F32), low=plgpu.Barrier(num_barriers=slices))

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            sizes = dict(stages=stages, slices=slices, key_dim=key_dim)
            at = self.place(refs, smem, chunks, delta=delta, values=values, **sizes)
            wg, at.first_value = at.wg, at.value_block * self.value_tile
            if self.lead is not None:
                at.lead = at.refs.lead[at.piece, at.head]
                at.first, at.count = at.first - at.lead, at.count + at.lead
            blocks.role(wg < slices, lambda: self.hold_state(at, wg), increase=REGISTERS[0])
            blocks.role(wg == slices, lambda: self.issue_copies(at), decrease=REGISTERS[1])

        grid = dict(b=batch * self.pieces, h=value_heads, v=value_dim // self.value_tile)
        name = ("delta" if delta else "additive") + "_channel_" + self.mode
        out = blocks.launch(i, name, body, arrays, results, scratch, grid, threads=slices + 1)
        return Scanned(**out)

    def issue_copies(self, at: SimpleNamespace) -> None:
        smem, refs = at.smem, at.refs

        def fill(n: Any, slot: Any) -> None:
            chunk = at.first + n
            rows, barrier = pl.ds(chunk * C, C), smem.filled.at[slot]

            keys, pairs = (at.b, rows, at.head), (at.b, at.head, rows)
            given = vars(refs), vars(smem), slot, barrier
            fetch(*given, read_k=keys, read_q=keys)
            if at.values:
                fetch_values(refs.v, keys, at.first_value, smem.v, slot, barrier, at.slices)
            fetch(*given, beta=pairs, high=pairs, scores=pairs, write=keys, carry=(at.b, at.head, chunk))

        blocks.refill(fill, smem.free, at.count, at.stages)

    def hold_state(self, at: SimpleNamespace, wg: Any) -> None:
        smem, refs = at.smem, at.refs
        columns = pl.ds(at.first_value + wg * C, C)
        shape = (C, at.key_dim)
        initial = getattr(refs, "initial", None)
        if not at.values:
            row = blocks.row_index(shape) + (at.first_value + wg * C)
            state = jnp.where(row == blocks.col_index(shape), 1.0, 0.0)
        elif self.lead is not None and initial is not None:
            load = lambda: blocks.state(initial, shape, (at.b, at.head, columns))
            state = lax.cond(at.first == 0, load, lambda: blocks.zeros(shape))
        else:
            state = blocks.state(initial, shape, (at.piece, at.head, columns))

        def step(at: SimpleNamespace, n: Any, state: jax.Array, parts: int, hard: Any) -> jax.Array:
            slot = blocks.rem(n, at.stages)
            rows = pl.ds((at.first + n) * C, C)
            low = lambda: refs.low.at[at.b, at.head, rows]
            two_parts.load_low(parts == 2, low, smem.o.at[wg], smem.low.at[wg] if at.delta else None)
            state_lo = state.astype(BF16)
            if at.keep:
                forward_scan.keep_state(at, wg, state_lo, at.first + n, columns)
            plgpu.barrier_wait(smem.filled.at[slot])
            keys = [smem.read_k.at[slot].T] if at.delta else []
            keys += [smem.read_q.at[slot].T] if at.output else []
            read = forward_scan.read_by(state_lo, keys)
            value: Any = blocks.tile(smem.v.at[slot, wg].T) if at.values else 0.0
            if at.delta:
                value = (value - read[0]) * blocks.by_col(blocks.col_vector(smem.beta.at[slot]))
                value = forward_scan.times_inverse(at, wg, value, smem.high.at[slot].T, parts, hard)
            carry = lambda: blocks.by_col(blocks.col_vector(smem.carry.at[slot]), shape)
            seen = lambda: (smem.scores.at[slot].T, read[-1])
            written = lambda: (value, smem.write.at[slot], state * carry())
            state = forward_scan.advance(at, wg, value, seen, written, parts, hard)
            plgpu.commit_smem()  # also before the arrival: TMA may then overwrite what was read here
            plgpu.barrier_arrive(smem.free.at[slot])
            forward_scan.send(at, wg, rows, columns)
            return state

        start: Any = 0
        if self.lead is not None:
            start = at.lead
            quiet = SimpleNamespace(**vars(at) | dict(output=False, keep=False, count=at.lead))
            state = forward_scan.hold(quiet, functools.partial(step, quiet), state)
        state = forward_scan.hold(at, functools.partial(step, at), state, start)
        if self.final or not at.output:
            refs.final.at[at.piece, at.head, columns][...] = state
        plgpu.wait_smem_to_gmem(0)
