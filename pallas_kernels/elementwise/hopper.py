"""The Hopper backend: one pass over memory forward, one backward, in Pallas Mosaic GPU.

A thread owns a channel and walks along the tokens with its state in a register. Tiles of tokens by 128
channels come by TMA through a ring in shared memory, which a second warpgroup keeps full: so a few blocks of
threads, too few for threads to hide the memory's latency, have enough of it in flight. Results go straight
to memory, 128 neighbours at once. Where documents start is a bit a token, one word a tile.

Where B * F channels leave the GPU idle, a sequence is cut into pieces: a walk without outputs gives what each
piece does to the state (`Piece`), and all pieces are then walked at once from where they start.

Shape legend: B batch, T time, F channels, P pieces, N tiles of a sequence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.elementwise import reference
from pallas_kernels.elementwise.call import Call, make
from pallas_kernels.elementwise.pieces import Piece, chain
from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.padding import pad_time, round_up

__all__ = ["elementwise_recurrence", "runs_on", "self_test", "supports"]

CHANNELS = 128  # of a block of threads, one a thread
ROW = 64  # bytes that the tokens of a tile have in a channel: 32 tokens in bf16, 16 in float32
RING = 100 * 1024  # bytes of tiles in flight: two blocks of threads share a multiprocessor
GROUP = 8  # tokens that a thread reads at once
FEW, FILL = 48, 128  # blocks of threads below which a sequence is cut, and how many its pieces aim at
LEAST = 256  # tokens of a piece
DTYPES = (jnp.bfloat16, jnp.float32)
NAMES = ("h", "final state", "dx", "dlog_decay", "dinitial_state")
Values = list[Any]


def supports(call: Call) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    batch, length, features = call.x.shape
    if call.x.dtype not in DTYPES or call.log_decay.dtype not in DTYPES:
        return f"dtypes {call.x.dtype} and {call.log_decay.dtype} (bfloat16 and float32 only)"
    if features % CHANNELS or not features:
        return f"{features} channels (a multiple of {CHANNELS})"
    if length < ROW:
        return f"{length} tokens (at least {ROW})"
    if not 0 < batch <= 65535 or length >= 2**24:
        return f"{batch} sequences of {length} tokens (at most 65535 of 2^24)"
    return None


def elementwise_recurrence(call: Call, pieces: int | None = None) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.elementwise_recurrence`.  pieces: as many that whole tiles are in each."""
    batch, length, features = call.x.shape
    rows = tile_rows(call)
    padded = round_up(length, rows)
    words = None
    if call.starts is not None:
        bits = pad_time(call.starts, padded).reshape(batch, padded // rows, rows)
        words = jnp.sum(bits.astype(jnp.int32) << jnp.arange(rows), axis=-1)
    if pieces is None:
        pieces = choose_pieces(batch, padded // rows, rows, features)
    # Tokens with x = 0 and no decay leave the state as it is.
    x, log_decay = (pad_time(array, padded) for array in (call.x, call.log_decay))
    h, final = _recurrence(x, log_decay, words, call.state, rows, pieces, call.interpret)
    return h[:, :length], final


def self_test() -> str | None:
    """See `requirements.self_test`; whole sequences and pieces, with and without documents."""

    def results() -> dict[str, tuple[jax.Array, jax.Array]]:
        draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
        x, dh = (draw(n, 1, 128, CHANNELS).astype(jnp.bfloat16) for n in range(2))
        log_decay, state, dfinal = -jnp.abs(draw(2, *x.shape)), draw(3, 1, CHANNELS), draw(4, 1, CHANNELS)
        pairs: dict[str, tuple[jax.Array, jax.Array]] = {}
        for pieces, starts in ((1, jnp.arange(128)[None] % 50 == 49), (2, None)):

            def run(compute: Callable[[Call], Any], starts: Any = starts) -> list[jax.Array]:
                arguments = x, log_decay, state
                out, pull = jax.vjp(lambda x, g, state: compute(make(x, g, starts, state)), *arguments)
                return [*out, *pull((dh, dfinal))]

            kernels = functools.partial(elementwise_recurrence, pieces=pieces)
            both = zip(NAMES, run(kernels), run(reference.elementwise_recurrence), strict=True)
            pairs |= {f"{name}, {pieces} pieces": (got, want) for name, got, want in both}
        return pairs

    return requirements.self_test("elementwise_recurrence", results)


def tile_rows(call: Call) -> int:
    """Tokens of a tile."""
    return ROW // max(call.x.dtype.itemsize, call.log_decay.dtype.itemsize)


def choose_pieces(batch: int, tiles: int, rows: int, features: int) -> int:
    """Into how many pieces of whole tiles a sequence is cut."""
    pieces, walks = 1, batch * features // CHANNELS
    while walks < FEW and 2 * pieces * walks <= FILL and tiles % (2 * pieces) == 0:
        if tiles * rows < 2 * pieces * LEAST:
            break
        pieces *= 2
    return pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _recurrence(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(*arguments)[0]


def _forward(
    x: jax.Array,
    log_decay: jax.Array,
    words: jax.Array | None,
    state: jax.Array,
    rows: int,
    pieces: int,
    interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    walk = Walk(words, rows, pieces, interpret)
    start = state[:, None]
    if pieces > 1:
        start = chain(walk.summary(x, log_decay), state)
    h, ends = walk.states(x, log_decay, start)
    return (h, ends[:, -1]), (log_decay, words, state, h)


def _backward(rows: int, pieces: int, interpret: bool, kept: tuple, cotangents: tuple) -> tuple:
    log_decay, words, state, h = kept
    dh, dfinal = cotangents
    walk = Walk(words, rows, pieces, interpret, reverse=True)
    start = dfinal[:, None]
    if pieces > 1:
        start = chain(walk.summary(dh, log_decay), dfinal, reverse=True)
    dx, dlog_decay, ends = walk.gradients(dh, log_decay, h, start, state)
    dwords = None if words is None else np.zeros(words.shape, jax.dtypes.float0)
    return dx, dlog_decay, dwords, ends[:, 0]


_recurrence.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The walks of all sequences, pieces and channels along the tokens, from the last one with ``reverse``.

    words: None or int32 [B, N]: bit i of word n is whether a document starts at token i of tile n.
    rows: tokens of a tile.  pieces: equal runs of tiles that a sequence is cut into.
    """

    words: jax.Array | None
    rows: int
    pieces: int
    interpret: Any
    reverse: bool = False

    def states(self, x: jax.Array, log_decay: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(h [B, T, F] as x, the state after each piece [B, P, F]) from that before each, ``start``."""

        def token(at: Any, values: Values, carry: Values) -> tuple[Values, Values]:
            (x, log_decay), (state,) = values, carry
            state = _exp(log_decay) * at.unless_start(state) + x
            return [state], [state]

        h, ends = self._run(token, "states", [x, log_decay], [x], [start])
        return h, ends

    def summary(self, x: jax.Array, log_decay: jax.Array) -> Piece:
        """What each piece does to the state, or with ``reverse`` (x are the gradients of h) its gradient."""

        def token(at: Any, values: Values, carry: Values) -> tuple[Values, Values]:
            (x, log_decay), (state, product) = values, carry
            decay = _exp(log_decay)
            state = (
                at.unless_start(decay * (state + x)) if self.reverse else decay * at.unless_start(state) + x
            )
            return [], [state, product * decay]

        start = jnp.zeros((x.shape[0], self.pieces, x.shape[2]), F32)
        alone, decay = self._run(token, "summary", [x, log_decay], [], [start, start + 1])
        reset = None
        if self.words is not None:
            reset = jnp.any(self.words.reshape(*start.shape[:2], -1) != 0, axis=-1, keepdims=True)
        return Piece(decay, alone, reset)

    def gradients(
        self, dh: jax.Array, log_decay: jax.Array, h: jax.Array, start: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dx as dh, dlog_decay as log_decay, the gradient of the state before each piece [B, P, F]).

        start: the gradient of the state after each piece.  state: [B, F], before the first token.
        """

        def token(at: Any, values: Values, carry: Values) -> tuple[Values, Values]:
            (dh, log_decay, before), (later,) = values, carry
            dx = dh + later
            moved = _exp(log_decay) * dx
            return [dx, at.unless_start(moved * before)], [at.unless_start(moved)]

        read = [dh, log_decay, h]
        dx, dlog_decay, ends = self._run(token, "gradients", read, [dh, log_decay], [start], before=state)
        return dx, dlog_decay, ends

    def _run(
        self,
        token: Callable[[Any, Values, Values], tuple[Values, Values]],
        name: str,
        read: Sequence[jax.Array],
        like: Sequence[jax.Array],
        starts: Sequence[jax.Array],
        before: jax.Array | None = None,
    ) -> list[jax.Array]:
        """[arrays like ``like`` of what ``token`` returns first, then the last carries, like ``starts``].

        before: [B, F]; the last array of ``read`` is then read one token late, with it for the first token.
        """
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
                            at = _At(None if self.words is None else (word >> tokens[i]) & 1 == 1)
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
            manual_barriers=True,
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


@dataclasses.dataclass(frozen=True)
class _At:
    """A token.  starts: whether a document starts there; None if none does anywhere."""

    starts: jax.Array | None

    def unless_start(self, value: jax.Array) -> jax.Array:
        return value if self.starts is None else jnp.where(self.starts, 0.0, value)


def _load(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def _exp(x: jax.Array) -> jax.Array:
    return jnp.exp2(x * blocks.LOG2E)


def _split(refs: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = np.cumsum(sizes)
    return [refs[end - size : end] for end, size in zip(ends, sizes, strict=True)]
