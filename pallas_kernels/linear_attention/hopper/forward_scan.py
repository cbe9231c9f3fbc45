"""The scan over chunks: one block of threads per sequence (or piece of one), value head and slice of V.

Warpgroups: one or two hold S^T (64 values by K, float32, in registers) and run the chain of products; one or
two prepare a chunk ahead, scores P = q.k exp(G_i - G_j) and the numbers per token; one issues the copies.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts, warm_up
from pallas_kernels.linear_attention.hopper.blocks import BF16, CARRY, F32, NORM_K, READ_K, READ_Q, WRITE, C
from pallas_kernels.linear_attention.hopper.gates import write_gates
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors, fetch, fetch_values

AHEAD = 2  # chunks that may be prepared before the state warpgroups take them


class Roles(NamedTuple):
    """Warpgroups of each kind, and registers a thread of each: 65,536 in all, in steps of 8."""

    state: int
    prepare: int
    state_registers: int
    prepare_registers: int
    copy_registers: int

    @property
    def threads(self) -> int:
        return self.state + self.prepare + 1


LAUNCHED = 128  # registers a thread of a block of four warpgroups
ROLES = {64: Roles(1, 2, 232, 128, 24), 128: Roles(2, 1, 192, 104, 24)}  # by values in a slice of V


class Scanned(NamedTuple):
    """Results of `scan`; None for what was not asked for.

    o: [B, T, HV, V] bf16.  final: S^T after each piece [B * pieces, HV, V, K] float32.
    moves: what each piece does to the state it starts from: S^T after it when it starts from the identity and
    writes no values, [B * pieces, HV, K, K] float32.
    states: S^T before each chunk [B, HV, T/C, V, K] bf16.  With the delta rule also gates [B, HV, T/C, 8, C]
    float32 and values, V' [B, T, HV, V] bf16.
    """

    o: Any = None
    final: Any = None
    moves: Any = None
    gates: Any = None
    states: Any = None
    values: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a scan is to compute.

    mode: "output"; "summary", the state after each piece alone, and with the delta rule its moves. pieces:
    every sequence is cut into so many equal runs of chunks, each with its own initial state. final: also
    return the last states. keep: also return what the backward pass wants. walk: None or how far, without
    outputs: `warm_up.Walks.last`.
    """

    pieces: int = 1
    mode: str = "output"
    final: bool = False
    keep: bool = False
    walk: jax.Array | None = None

    def stages(self, chunks: int, stage: int, fixed: int) -> int:
        """`blocks.stages` for as many chunks as a block of threads walks."""
        run = chunks // self.pieces
        return blocks.stages(run if self.walk is None else warm_up.chunks(run), stage, fixed)

    def results(
        self, whole: tuple[int, int], heads: int, value_dim: int, key_dim: int, *, delta: bool
    ) -> dict[str, jax.ShapeDtypeStruct | None]:
        """The fields of `Scanned` that are wanted, but moves and gates; whole: batch and length."""
        batch, length = whole
        output = self.mode == "output"
        outputs = jax.ShapeDtypeStruct((batch, length, heads, value_dim), BF16)
        last = jax.ShapeDtypeStruct((batch * self.pieces, heads, value_dim, key_dim), F32)
        states = jax.ShapeDtypeStruct((batch, heads, length // C, value_dim, key_dim), BF16)
        return dict(
            o=outputs if output else None,
            final=last if self.final or not output else None,
            moves=None,
            gates=None,
            states=states if self.keep else None,
            values=outputs if self.keep and delta else None,
        )

    def place(self, refs: dict[str, Any], smem: dict[str, Any], chunks: int, **known: Any) -> SimpleNamespace:
        """Where this block of threads is, and what its parts must know."""
        b, head, value_block, wg = (lax.axis_index(name) for name in ("b", "h", "v", "wg"))
        count = chunks // self.pieces
        known |= dict(refs=SimpleNamespace(**refs), smem=SimpleNamespace(**smem), keep=self.keep)
        known |= dict(piece=b, b=blocks.div(b, self.pieces), head=head, value_block=value_block, wg=wg)
        known |= dict(count=count, first=blocks.rem(b, self.pieces) * count, output=self.mode == "output")
        if self.walk is not None:
            known |= dict(first=refs["walk"][b, head, 0], count=refs["walk"][b, head, 1])
        return SimpleNamespace(**known)


@dataclasses.dataclass(frozen=True)
class Scan(Wanted):
    """One compiled scan."""

    inputs: Inputs
    inverses: two_parts.Inverse | None
    value_tile: int

    def __call__(self) -> Scanned:
        i = self.inputs
        batch, length, heads, value_heads, key_dim, value_dim = i.sizes
        output, delta = self.mode == "output", self.inverses is not None
        moves = delta and not output  # one warpgroup holds 64 values, the other 64 rows of the moves
        roles = ROLES[128 if moves else self.value_tile]
        tiles = roles.state
        value_tiles = 1 if moves else tiles
        chunks = length // C
        vectors = Vectors(i, ("log_decay", "beta", "segment", "entering"))

        stage = 2 * C * (key_dim * (1 + output) + C * (value_tiles + delta)) + 4 * C * len(vectors)
        fixed = AHEAD * (2 * C * C * output + 32 * C)
        fixed += 2 * tiles * C * (C + self.keep * (key_dim + C * delta)) + 10 * 1024
        stages = self.stages(chunks, stage, fixed)

        results = self.results((batch, length), value_heads, value_dim, key_dim, delta=delta)
        if moves:
            results["moves"] = jax.ShapeDtypeStruct((batch * self.pieces, value_heads, key_dim, key_dim), F32)
        if self.keep and delta:
            results["gates"] = jax.ShapeDtypeStruct((batch, value_heads, chunks, 8, C), F32)
        arrays = dict(q=i.q if output else None, k=i.k, v=i.v)
        arrays |= vectors.named | two_parts.named(self.inverses) | dict(initial=i.state, walk=self.walk)
        scratch = dict(
            k=blocks.smem((stages, C, key_dim), BF16),
            q=blocks.smem((stages, C, key_dim), BF16) if output else None,
            v=blocks.smem((stages, value_tiles, C, C), BF16),
            high=blocks.smem((stages, C, C), BF16) if delta else None,
            vectors=plgpu.SMEM((stages, len(vectors), C), F32) if len(vectors) else None,
            gates=plgpu.SMEM((AHEAD, 8, C), F32),
            scores=blocks.smem((AHEAD, C, C), BF16) if output else None,
            o=blocks.smem((tiles, C, C), BF16),  # before, if the chunk is hard: A's second part
            states=blocks.smem((tiles, C, key_dim), BF16) if self.keep else None,
            values=blocks.smem((tiles, C, C), BF16) if self.keep and delta else None,
            filled=plgpu.Barrier(
                num_arrivals=1 + output + value_tiles + delta + len(vectors), num_barriers=stages
            ),
            free=plgpu.Barrier(num_arrivals=tiles + 1, num_barriers=stages),
            ready=plgpu.Barrier(num_barriers=AHEAD),
            taken=plgpu.Barrier(num_arrivals=tiles, num_barriers=AHEAD),
            low=plgpu.Barrier(num_barriers=tiles) if delta else None,
        )

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            at = self.place(
                refs, smem, chunks, stages=stages, value_tiles=value_tiles, roles=roles, vectors=vectors,
                delta=delta, key_dim=key_dim, keep_gates=self.keep and delta,
            )  # fmt: skip
            wg, value_block = at.wg, at.value_block
            at.key_head = blocks.div(at.head, value_heads // heads)
            value_tile = blocks.rem(value_block, value_dim // C) if moves else value_block
            at.first_value = value_tile * (C if moves else self.value_tile)
            at.first_key = blocks.rem(value_block, key_dim // C) * C

            more, fewer = roles.state_registers, roles.prepare_registers
            mine = 0 if moves else wg
            blocks.role(wg < (1 if moves else tiles), lambda: self.hold_state(at, mine), increase=more)
            if moves:
                blocks.role(wg == 1, lambda: self.hold_state(at, 0, moves=True), increase=more)
            preparing, prepare = wg >= tiles, lambda: self.prepare_chunks(at, wg - tiles)
            preparing &= wg < tiles + roles.prepare
            blocks.role(preparing, prepare, decrease=0 if fewer == LAUNCHED else fewer)
            copying = wg == tiles + roles.prepare
            blocks.role(copying, lambda: self.issue_copies(at), decrease=roles.copy_registers)

        value_blocks = max(value_dim, key_dim) // C if moves else value_dim // self.value_tile
        grid = dict(b=batch * self.pieces, h=value_heads, v=value_blocks)
        name = ("delta_" if delta else "additive_") + self.mode
        out = blocks.launch(i, name, body, arrays, results, scratch, grid, threads=roles.threads)
        return Scanned(**out)

    def issue_copies(self, at: SimpleNamespace) -> None:
        smem, refs = at.smem, at.refs

        def fill(n: Any, slot: Any) -> None:
            rows, barrier = pl.ds((at.first + n) * C, C), smem.filled.at[slot]
            keys, pairs = (at.b, rows, at.key_head), (at.b, at.head, rows)
            fetch(vars(refs), vars(smem), slot, barrier, k=keys, q=keys, high=pairs)
            place = at.b, rows, at.head
            fetch_values(refs.v, place, at.first_value, smem.v, slot, barrier, at.value_tiles)
            if len(at.vectors):
                at.vectors.copy(vars(refs), smem.vectors.at[slot], barrier, at.b, at.head, rows)

        blocks.refill(fill, smem.free, at.count, at.stages)

    def prepare_chunks(self, at: SimpleNamespace, turn: Any) -> None:
        """Chunks n with n % (warpgroups of this kind) == turn."""
        smem, share = at.smem, at.roles.prepare

        @pl.loop(0, at.count)
        def _(n: Any) -> None:
            slot, ahead = blocks.rem(n, at.stages), blocks.rem(n, AHEAD)
            plgpu.barrier_wait(smem.filled.at[slot])

            @pl.when(blocks.rem(n, share) == turn)
            def _() -> None:
                @pl.when(n >= AHEAD)
                def _() -> None:
                    plgpu.barrier_wait(smem.taken.at[ahead])

                self.prepare_chunk(at, slot, ahead)
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.ready.at[ahead])
                plgpu.barrier_arrive(smem.free.at[slot])
                if at.keep_gates:

                    @pl.when(at.first_value == 0)
                    def _() -> None:
                        plgpu.copy_smem_to_gmem(
                            smem.gates.at[ahead], at.refs.gates.at[at.b, at.head, at.first + n]
                        )
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for n in blocks.last(at.count, AHEAD):

            @pl.when(turn == blocks.rem(n, share))
            def _(n: Any = n) -> None:
                plgpu.barrier_wait(smem.taken.at[blocks.rem(n, AHEAD)])

        plgpu.wait_smem_to_gmem(0)

    def prepare_chunk(self, at: SimpleNamespace, slot: Any, ahead: Any) -> None:
        i, smem = self.inputs, at.smem
        k, q = smem.k.at[slot], smem.q.at[slot] if at.output else None
        numbers = smem.vectors.at[slot] if len(at.vectors) else None
        gates = smem.gates.at[ahead]
        norm_q, sums, segment = write_gates(i, at.vectors, numbers, gates, q=q, k=k, every=at.keep_gates)
        if not at.output:
            return
        scores = blocks.matmul((q, k.T)) * blocks.by_row(norm_q)
        if i.l2norm:
            scores *= blocks.by_col(blocks.col_vector(gates.at[NORM_K]))
        scores *= blocks.pair_decay(blocks.causal(segment), sums)
        blocks.store(smem.scores.at[ahead], scores.astype(BF16))

    def hold_state(self, at: SimpleNamespace, wg: Any, moves: bool = False) -> None:
        """The state of 64 values; with ``moves`` of 64 rows of the identity, without values."""
        smem, refs = at.smem, at.refs
        columns = pl.ds((at.first_key if moves else at.first_value) + wg * C, C)
        shape = (C, at.key_dim)
        if moves:
            state = jnp.where(blocks.row_index(shape) + at.first_key == blocks.col_index(shape), 1.0, 0.0)
        else:
            state = blocks.state(getattr(refs, "initial", None), shape, (at.piece, at.head, columns))
        mine = 1 if moves else wg

        def step(n: Any, state: jax.Array, parts: int, hard: Any) -> jax.Array:
            slot, ahead = blocks.rem(n, at.stages), blocks.rem(n, AHEAD)
            k, gates = smem.k.at[slot], smem.gates.at[ahead]
            rows = pl.ds((at.first + n) * C, C)
            by_token = lambda row: blocks.by_col(blocks.col_vector(gates.at[row]))
            low = lambda: refs.low.at[at.b, at.head, rows]
            two_parts.load_low(parts == 2, low, smem.o.at[mine], smem.low.at[mine] if at.delta else None)
            state_lo = state.astype(BF16)
            if at.keep:
                keep_state(at, wg, state_lo, at.first + n, columns)
            plgpu.barrier_wait(smem.filled.at[slot])
            keys = [k.T] if at.delta else []
            keys += [smem.q.at[slot].T] if at.output else []
            read = read_by(state_lo, keys)
            plgpu.barrier_wait(smem.ready.at[ahead])
            value: Any = 0.0 if moves else blocks.tile(smem.v.at[slot, wg].T)
            if at.delta:
                beta = blocks.by_col(blocks.col_vector(at.vectors.get("beta", smem.vectors.at[slot])))
                value = (value - read[0] * by_token(READ_K)) * beta
                value = times_inverse(at, mine, value, smem.high.at[slot].T, parts, hard)
            seen = lambda: (smem.scores.at[ahead].T, read[-1] * by_token(READ_Q))
            written = lambda: (value * by_token(WRITE), k, state * gates[CARRY, 0])
            state = advance(at, wg, value, seen, written, parts, hard)
            plgpu.commit_smem()  # also before the arrivals: TMA may then overwrite what was read here
            plgpu.barrier_arrive(smem.taken.at[ahead])
            plgpu.barrier_arrive(smem.free.at[slot])
            send(at, wg, rows, columns)
            return state

        state = hold(at, step, state)
        if self.final or not at.output:
            last = refs.moves if moves else refs.final

            @pl.when(at.value_block < last.shape[2] // C)  # where K is not V, the smaller is held twice
            def _() -> None:
                last.at[at.piece, at.head, columns][...] = state

        plgpu.wait_smem_to_gmem(0)


# What a warpgroup that holds state does with each chunk, here and in channel_scan.py.


def hold(at: SimpleNamespace, step: Callable, state: jax.Array, start: Any = 0) -> jax.Array:
    """The state after the piece's chunks, from that before its chunk ``start``."""
    hardness = lambda n: at.refs.hard[at.b, at.head, at.first + n, 0]
    return two_parts.loop(at.count, step, state, hardness if at.delta else None, start=start)


def read_by(state: jax.Array, keys: list) -> tuple[jax.Array, ...]:
    """The state times each of the tiles."""
    return blocks.sums_of_products(*[([(state, key)], (C, C)) for key in keys]) if keys else ()


def times_inverse(
    at: SimpleNamespace, mine: Any, value: jax.Array, high: Any, parts: int, hard: Any
) -> jax.Array:
    low = at.smem.o.at[mine].T, at.smem.low.at[mine]
    return two_parts.times_inverse(value, high, *low, parts, hard)


def advance(
    at: SimpleNamespace,
    wg: Any,
    value: jax.Array,
    seen: Callable[[], tuple],
    written: Callable[[], tuple],
    parts: int,
    hard: Any,
) -> jax.Array:
    """The state after a chunk; its outputs, and V', go where `send` takes them.

    value: V'.  seen: what multiplies it for the outputs, and what they are without it.  written: V' as the
    state gets it, what multiplies that, and what is left of the state.
    """
    split = functools.partial(two_parts.split, parts=parts)

    def after() -> tuple:
        new, keys, kept = written()
        return [(part, keys) for part in split(new)], kept

    if not at.output:
        return blocks.sums_of_products(after())[0]
    values = split(value, hard=hard)

    def outputs() -> tuple:
        scores, read = seen()
        return [(part, scores) for part in values], read

    o, state = two_parts.products(outputs, after, parts=parts)
    wait_for_last(at)
    blocks.store(at.smem.o.at[wg], o.astype(BF16), transposed=True)
    if at.keep and at.delta:
        blocks.store(at.smem.values.at[wg], values[0], transposed=True)
    return state


def wait_for_last(at: SimpleNamespace) -> None:
    """Until the last chunk's copy of the kind that is to be sent next has left shared memory."""
    plgpu.wait_smem_to_gmem(at.output + at.keep - 1, wait_read_only=True)


def keep_state(at: SimpleNamespace, wg: Any, state: jax.Array, chunk: Any, columns: Any) -> None:
    wait_for_last(at)
    blocks.store(at.smem.states.at[wg], state)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(at.smem.states.at[wg], at.refs.states.at[at.b, at.head, chunk, columns])


def send(at: SimpleNamespace, wg: Any, rows: Any, columns: Any) -> None:
    if not at.output:
        return
    if at.keep and at.delta:
        values = at.refs.values.at[at.b, rows, at.head, columns]
        plgpu.copy_smem_to_gmem(at.smem.values.at[wg], values, commit_group=False)
    plgpu.copy_smem_to_gmem(at.smem.o.at[wg], at.refs.o.at[at.b, rows, at.head, columns])
