"""The portable backend: one pass over memory forward, one backward, in Pallas's Triton lowering.

A block of threads takes 32 channels and, at a time, RUNS runs of `ROWS` tokens, a run a warp, a channel a
thread: it walks every run from a state of zeros, hands the state from run to run, and walks each again from
where it starts, with the inputs still in registers. So all tokens of a tile are read at once.

Shape legend as in `walks`; a tile is RUNS runs.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import agreement
from pallas_kernels.dispatch import Device
from pallas_kernels.elementwise import walks
from pallas_kernels.elementwise.call import Call
from pallas_kernels.elementwise.walks import At, Job, Token, Values
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.tiles import F32

CHANNELS = 32
RUNS = 8
ROWS = 16
PIECES = 8  # at most


def supports(call: Call) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    if call.x.shape[0] * PIECES > 65535:
        return f"{call.x.shape[0]} sequences (at most {65535 // PIECES})"
    return walks.refusal(call, CHANNELS)


def elementwise_recurrence(call: Call, pieces: int | None = None) -> tuple[jax.Array, jax.Array]:
    """See `walks.recurrence`."""
    return walks.recurrence(Walk, call, ROWS, RUNS * ROWS, pieces)


runs_on = Device.before_ampere


def self_test() -> str | None:
    """See `agreement.self_test`."""
    results = lambda: walks.trial(elementwise_recurrence, 2 * RUNS * ROWS, CHANNELS)
    return agreement.self_test("elementwise_recurrence", results)


@dataclasses.dataclass(frozen=True)
class Walk(walks.Walk):
    channels: ClassVar[int] = CHANNELS
    few: ClassVar[int] = 96
    fill: ClassVar[int] = 256

    def run(self, job: Job) -> list[jax.Array]:
        """See `walks.Walk`."""
        name, token, read, like, starts, before = job
        batch, length, features = read[0].shape
        runs = length // ROWS
        of_tokens = pl.BlockSpec((None, runs, ROWS, CHANNELS), lambda f, p, b: (b, 0, 0, f))
        of_runs = pl.BlockSpec((None, runs, CHANNELS), lambda f, p, b: (b, 0, f))
        of_pieces = pl.BlockSpec((None, None, CHANNELS), lambda f, p, b: (b, p, f))
        by_run = lambda x: x.reshape(batch, runs, ROWS, features)
        given = {f"read{i}": by_run(x) for i, x in enumerate(read)}
        blocks = dict.fromkeys(given, of_tokens)
        if before is not None:  # what is read one token late has its first token of each run apart
            last = given["read2"][:, :-1, -1].astype(F32)
            given["before"] = jnp.concatenate([before[:, None], last], axis=1)
            blocks["before"] = of_runs
        if self.words is not None:
            given["words"] = self.words[..., None]
            blocks["words"] = pl.BlockSpec((None, runs, 1), lambda f, p, b: (b, 0, 0))
        given |= {f"start{i}": x for i, x in enumerate(starts)}
        blocks |= {f"start{i}": of_pieces for i in range(len(starts))}
        out = {f"out{i}": jax.ShapeDtypeStruct(by_run(x).shape, x.dtype) for i, x in enumerate(like)}
        ends = {f"end{i}": jax.ShapeDtypeStruct(x.shape, F32) for i, x in enumerate(starts)}
        handed = jax.ShapeDtypeStruct((batch, self.pieces, 2, 2, RUNS, features), F32)
        of_blocks = pl.BlockSpec((None, None, 2, 2, RUNS, CHANNELS), lambda f, p, b: (b, p, 0, 0, 0, f))
        results = launch(
            lambda refs, out: self._piece(token, refs, out),
            f"elementwise_{name}",
            grid=(features // CHANNELS, self.pieces, batch),
            in_specs=[{what: blocks[what] for what in given}],
            out_specs=dict.fromkeys(out, of_tokens) | dict.fromkeys(ends, of_pieces) | {"handed": of_blocks},
            out_shape=out | ends | {"handed": handed},
            warps=RUNS,
            interpret=self.interpret,
        )(given)
        return [results[what].reshape(read[0].shape) for what in out] + [results[what] for what in ends]

    def _piece(self, token: Token, refs: dict[str, Any], out: dict[str, Any]) -> None:
        piece = pl.program_id(1) % self.pieces
        tiles = refs["read0"].shape[0] // RUNS // self.pieces
        carries = sum(name.startswith("start") for name in refs)
        order = range(ROWS)[:: -1 if self.reverse else 1]

        def tile(k: Any, carry: Values) -> Values:
            first = (piece * tiles + (tiles - 1 - k if self.reverse else k)) * RUNS
            at = pl.ds(first, RUNS)
            tokens, starts = [At(None)] * ROWS, None
            if "words" in refs:
                words = refs["words"][at, :]
                tokens = [At((words >> r) & 1 == 1) for r in range(ROWS)]
                starts = words != 0
            values = [[refs[f"read{i}"][at, r, :].astype(F32) for i in range(2)] for r in range(ROWS)]
            if "before" in refs:  # before the barrier, as all that is read
                late = [refs["before"][at, :]]
                late += [refs["read2"][at, r, :].astype(F32) for r in range(ROWS - 1)]
                values = [[*given, old] for given, old in zip(values, late, strict=True)]
            alone = [jnp.zeros((RUNS, CHANNELS), F32), jnp.ones((RUNS, CHANNELS), F32)]
            for r in order:
                alone = self.alone(tokens[r], *values[r][:2], *alone)
            carry, states = self._hand_over(out["handed"], k & 1, starts, alone, carry)
            if carries == 1:
                state = [states]
                for r in order:
                    results, state = token(tokens[r], values[r], state)
                    for i, result in enumerate(results):
                        ref = out[f"out{i}"]
                        ref[at, r, :] = result.astype(ref.dtype)
            return carry

        # A row for each run, all the same: then nothing moves between threads.
        carry = [jnp.broadcast_to(refs[f"start{i}"][:][None], (RUNS, CHANNELS)) for i in range(carries)]
        carry = jax.lax.fori_loop(0, tiles, tile, carry)
        for i, value in enumerate(carry):
            out[f"end{i}"][:] = jnp.sum(jnp.where(_places(0) == 0, value, 0.0), axis=0)

    def _hand_over(
        self, handed: Any, slot: Any, starts: Any, alone: Values, carry: Values
    ) -> tuple[Values, Any]:
        """The carry after a tile of runs, and the state before each run, both [RUNS, CHANNELS].

        What each run does goes through memory, which the caches answer: one barrier, where sums over warps
        would need two for each run. handed: [2, RUNS, CHANNELS], not that of the tile before, which
        others may still read. starts: whether a document starts in each run.
        """
        row, column = _places(0), _places(1)
        handed[slot, 0] = alone[0]
        handed[slot, 1] = alone[1] if starts is None else jnp.where(starts, -1.0, alone[1])
        if not self.interpret:
            plgpu.debug_barrier()
        state, *product = carry
        states = state
        for w in range(RUNS)[:: -1 if self.reverse else 1]:
            states = jnp.where(row == w, state, states)
            mine, decay = (handed[slot, i, jnp.full_like(row, w), column] for i in range(2))
            after = decay * state + mine
            state, product = jnp.where(decay < 0, mine, after), [x * decay for x in product]
        return [state, *product], states


def _places(axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (RUNS, CHANNELS), axis)
