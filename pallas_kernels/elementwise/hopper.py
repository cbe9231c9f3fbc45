"""The Hopper backend: one pass over memory forward, one backward, in Pallas Mosaic GPU.

A thread owns a channel and walks along the tokens with its state in a register. Tiles of tokens by 128
channels come by TMA through a ring in shared memory, which a second warpgroup keeps full: so a few blocks of
threads, too few for threads to hide the memory's latency, have enough of it in flight. Results go straight
to memory, 128 neighbours at once. Where documents start is a bit a token, one word a tile.

Shape legend: B batch, T time, F channels, P pieces, N tiles of a sequence.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.elementwise import walks
from pallas_kernels.elementwise.call import Call
from pallas_kernels.elementwise.walks import At, Job, Values
from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.requirements import runs_on

__all__ = ["elementwise_recurrence", "runs_on", "self_test", "supports"]

CHANNELS = 128  # of a block of threads, one a thread
ROW = 64  # bytes that the tokens of a tile have in a channel: 32 tokens in bf16, 16 in float32
RING = 100 * 1024  # bytes of tiles in flight: two blocks of threads share a multiprocessor
GROUP = 8  # tokens that a thread reads at once


def supports(call: Call) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    if call.x.shape[1] < ROW:
        return f"{call.x.shape[1]} tokens (at least {ROW})"
    return walks.refusal(call, CHANNELS)


def elementwise_recurrence(call: Call, pieces: int | None = None) -> tuple[jax.Array, jax.Array]:
    """See `walks.recurrence`."""
    rows = ROW // max(call.x.dtype.itemsize, call.log_decay.dtype.itemsize)
    return walks.recurrence(Walk, call, rows, rows, pieces)


def self_test() -> str | None:
    """See `requirements.self_test`."""
    results = lambda: walks.trial(elementwise_recurrence, 128, CHANNELS)
    return requirements.self_test("elementwise_recurrence", results)


@dataclasses.dataclass(frozen=True)
class Walk(walks.Walk):
    """A tile is a run of `walks.Walk`."""

    channels: ClassVar[int] = CHANNELS
    few: ClassVar[int] = 48
    fill: ClassVar[int] = 128

    def run(self, job: Job) -> list[jax.Array]:
        """See `walks.Walk`."""
        name, token, read, like, starts, before = job
        batch, length, features = read[0].shape
        rows, tiles = self.rows, length // self.rows // self.pieces
        stages = min(tiles, RING // sum(rows * CHANNELS * array.dtype.itemsize for array in read))
        extra = [array for array in (self.words, before) if array is not None]
        sizes = (len(read), len(starts), len(extra), len(like), len(starts))

        def body(*refs: Any, ring: Sequence[Any], filled: Any, free: Any) -> None:
            read_refs, start_refs, extra_refs, out_refs, end_refs = _split(refs, sizes)
            b, p, f, wg = (lax.axis_index(axis) for axis in ("b", "p", "f", "wg"))
            columns = pl.ds(f * CHANNELS, CHANNELS)
            tile_of = lambda k: p * tiles + ((tiles - 1 - k) if self.reverse else k)

            def fill(k: Any, slot: Any) -> None:
                n, barrier = tile_of(k), filled.at[slot]
                if not isinstance(k, int):  # a slot that was read: only a fence puts TMA's writes after that
                    plgpu.commit_smem()  # here, where it does not hold up the walk
                for ref, buffer in list(zip(read_refs, ring, strict=True))[: None if before is None else -1]:
                    source = ref.at[b, pl.ds(n * rows, rows), columns]
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier)
                if before is None:
                    return
                ref, buffer = read_refs[-1], ring[-1]

                @pl.when(n > 0)
                def _() -> None:
                    source = ref.at[b, pl.ds(n * rows - 1, rows), columns]
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier)

                @pl.when(n == 0)
                def _() -> None:
                    source = ref.at[b, pl.ds(0, rows - 1), columns]
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot, pl.ds(1, rows - 1)], barrier)

            pl.when(wg == 1)(lambda: blocks.refill(fill, free, tiles, stages))

            @pl.when(wg == 0)
            def _() -> None:
                first: Any = None if before is None else _load(extra_refs[-1].at[b, columns])
                word_of = lambda k: jnp.int32(0) if self.words is None else extra_refs[0][b, tile_of(k)]

                def tile(k: Any, state: tuple) -> tuple:
                    carry, word = state
                    n, slot = tile_of(k), blocks.rem(k, stages)
                    next_word = word_of(jnp.minimum(k + 1, tiles - 1))
                    plgpu.barrier_wait(filled.at[slot])

                    def group(j: Any, carry: Values) -> Values:
                        j = rows // GROUP - 1 - j if self.reverse else j
                        tokens = [j * GROUP + i for i in range(GROUP)]
                        values = [[_load(buffer.at[slot, t]).astype(F32) for buffer in ring] for t in tokens]
                        if before is not None:
                            values[0][-1] = jnp.where((n == 0) & (j == 0), first, values[0][-1])
                        for i in range(GROUP)[:: -1 if self.reverse else 1]:
                            at = At(None if self.words is None else (word >> tokens[i]) & 1 == 1)
                            out, carry = token(at, values[i], carry)
                            for ref, value in zip(out_refs, out, strict=True):
                                ref[b, n * rows + tokens[i], columns] = value.astype(ref.dtype)
                        return carry

                    carry = lax.fori_loop(0, rows // GROUP, group, carry)
                    plgpu.barrier_arrive(free.at[slot])
                    return carry, next_word

                # A sum with what does not vary over a mesh's axes does not either, as all later ones.
                carry = [_load(ref.at[b, p, columns]) + jnp.zeros((CHANNELS,)) for ref in start_refs]
                carry, _ = lax.fori_loop(0, tiles, tile, (carry, word_of(0)))
                for ref, value in zip(end_refs, carry, strict=True):
                    ref[b, p, columns] = value

        run = blocks.kernel(
            body,
            name=f"elementwise_{name}",
            interpret=self.interpret,
            out_type=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (*like, *starts)],
            grid=(features // CHANNELS, self.pieces, batch),
            grid_names=("f", "p", "b"),
            num_threads=2,
            thread_name="wg",
            scratch_types=dict(
                ring=[plgpu.SMEM((stages, rows, CHANNELS), array.dtype) for array in read],
                filled=plgpu.Barrier(num_arrivals=len(read), num_barriers=stages),
                free=plgpu.Barrier(num_barriers=stages),
            ),
        )
        return run(*read, *starts, *extra)


def _load(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def _split(refs: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = np.cumsum(sizes)
    return [refs[end - size : end] for end, size in zip(ends, sizes, strict=True)]
