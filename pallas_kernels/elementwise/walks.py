"""The recurrence by walks along the tokens, whatever the kernels are written in: forward, and from the end.

Where B * F channels leave the GPU idle, a sequence is cut into pieces: a walk without outputs gives what each
piece does to the state (`Piece`), and all pieces are then walked at once from where they start.

Shape legend: B batch, T time, F channels, P pieces, N runs of a few tokens of a sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.elementwise import reference
from pallas_kernels.elementwise.call import Call, make
from pallas_kernels.elementwise.pieces import Piece, chain
from pallas_kernels.padding import pad_time, round_up

LEAST = 256  # tokens of a piece
DTYPES = (jnp.bfloat16, jnp.float32)
NAMES = ("h", "final state", "dx", "dlog_decay", "dinitial_state")
F32 = jnp.float32
Values = list[Any]


@dataclasses.dataclass(frozen=True)
class At:
    """A token.  starts: whether a document starts there; None if none does anywhere."""

    starts: Any

    def unless_start(self, value: Any) -> Any:
        return value if self.starts is None else jnp.where(self.starts, 0.0, value)


Token = Callable[[At, Values, Values], tuple[Values, Values]]


class Job(NamedTuple):
    """What a walk does: its results are arrays like ``like`` of what ``token`` returns first, then the last
    carries, like ``starts``.

    read: x or the gradients of h, log-decays and, with ``before``, h.  starts: [B, P, F], of the state and,
    without ``like``, of the product of decays.  before: [B, F]; h is then read one token late, with it for
    the first token.
    """

    name: str
    token: Token
    read: Sequence[jax.Array]
    like: Sequence[jax.Array]
    starts: Sequence[jax.Array]
    before: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Walk:
    """The walks of all sequences, pieces and channels along the tokens, from the last one with ``reverse``.

    words: None or int32 [B, N]: bit i of word n is whether a document starts at token i of run n.
    rows: tokens of a run.  pieces: equal ones that a sequence is cut into.
    channels: of a block of threads.  few, fill: blocks below which a sequence is cut, and how many its pieces
    aim at.
    """

    words: jax.Array | None
    rows: int
    pieces: int
    interpret: Any
    reverse: bool = False
    channels: ClassVar[int]
    few: ClassVar[int]
    fill: ClassVar[int]

    @classmethod
    def choose_pieces(cls, batch: int, tiles: int, tokens: int, features: int) -> int:
        """Into how many pieces of whole tiles, of so many ``tokens``, a sequence is cut."""
        pieces, walks = 1, batch * features // cls.channels
        while walks < cls.few and 2 * pieces * walks <= cls.fill and tiles % (2 * pieces) == 0:
            if tiles * tokens < 2 * pieces * LEAST:
                break
            pieces *= 2
        return pieces

    def run(self, job: Job) -> list[jax.Array]:
        """The results of a walk."""
        raise NotImplementedError  # each backend's own: this class is what they share

    def alone(self, at: At, x: Any, log_decay: Any, state: Any, product: Any) -> Values:
        """What the tokens up to this one do to a state of zeros, and the product of their decays.

        With ``reverse`` to its gradient, x those of h.
        """
        decay = exp(log_decay)
        after = at.unless_start(decay * (state + x)) if self.reverse else decay * at.unless_start(state) + x
        return [after, product * decay]

    def states(self, x: jax.Array, log_decay: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(h [B, T, F] as x, the state after each piece [B, P, F]) from that before each, ``start``."""

        def token(at: At, values: Values, carry: Values) -> tuple[Values, Values]:
            (x, log_decay), (state,) = values, carry
            state = exp(log_decay) * at.unless_start(state) + x
            return [state], [state]

        h, ends = self.run(Job("states", token, [x, log_decay], [x], [start]))
        return h, ends

    def summary(self, x: jax.Array, log_decay: jax.Array) -> Piece:
        """What each piece does to the state, or with ``reverse`` (x are the gradients of h) its gradient."""
        token: Token = lambda at, values, carry: ([], self.alone(at, *values, *carry))
        start = jnp.zeros((x.shape[0], self.pieces, x.shape[2]), F32)
        alone, decay = self.run(Job("summary", token, [x, log_decay], [], [start, start + 1]))
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

        def token(at: At, values: Values, carry: Values) -> tuple[Values, Values]:
            (dh, log_decay, before), (later,) = values, carry
            dx = dh + later
            moved = exp(log_decay) * dx
            return [dx, at.unless_start(moved * before)], [at.unless_start(moved)]

        job = Job("gradients", token, [dh, log_decay, h], [dh, log_decay], [start], before=state)
        dx, dlog_decay, ends = self.run(job)
        return dx, dlog_decay, ends


def exp(x: jax.Array) -> jax.Array:
    return jnp.exp2(x * math.log2(math.e))


def refusal(call: Call, channels: int) -> str | None:
    """Why kernels for a multiple of so many ``channels`` do not compute a call, or None."""
    batch, length, features = call.x.shape
    if call.x.dtype not in DTYPES or call.log_decay.dtype not in DTYPES:
        return f"dtypes {call.x.dtype} and {call.log_decay.dtype} (bfloat16 and float32 only)"
    if features % channels or not features:
        return f"{features} channels (a multiple of {channels})"
    if not 0 < batch <= 65535 or length >= 2**24:
        return f"{batch} sequences of {length} tokens (at most 65535 of 2^24)"
    return None


def recurrence(
    kind: type[Walk], call: Call, rows: int, tokens: int, pieces: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.elementwise_recurrence`.

    rows: tokens of a run.  tokens: of a tile, of whole runs.  pieces: as many that whole tiles are in each.
    """
    batch, length, features = call.x.shape
    padded = round_up(length, tokens)
    words = None
    if call.starts is not None:
        bits = pad_time(call.starts, padded).reshape(batch, padded // rows, rows)
        words = jnp.sum(bits.astype(jnp.int32) << jnp.arange(rows), axis=-1)
    if pieces is None:
        pieces = kind.choose_pieces(batch, padded // tokens, tokens, features)
    # Tokens with x = 0 and no decay leave the state as it is.
    x, log_decay = (pad_time(array, padded) for array in (call.x, call.log_decay))
    h, final = _recurrence(x, log_decay, words, call.state, kind, rows, pieces, call.interpret)
    return h[:, :length], final


def trial(compute: Callable[..., Any], length: int, features: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(``compute``'s, the token loop's) results of small calls: a whole row of documents, and two pieces."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    x, dh = (draw(n, 1, length, features).astype(jnp.bfloat16) for n in range(2))
    log_decay, state, dfinal = -jnp.abs(draw(2, *x.shape)), draw(3, 1, features), draw(4, 1, features)
    pairs: dict[str, tuple[jax.Array, jax.Array]] = {}
    for pieces, starts in ((1, jnp.arange(length)[None] % 50 == 49), (2, None)):

        def run(compute: Callable[[Call], Any], starts: Any = starts) -> list[jax.Array]:
            arguments = x, log_decay, state
            out, pull = jax.vjp(lambda x, g, state: compute(make(x, g, starts, state)), *arguments)
            return [*out, *pull((dh, dfinal))]

        kernels = functools.partial(compute, pieces=pieces)
        both = zip(NAMES, run(kernels), run(reference.elementwise_recurrence), strict=True)
        pairs |= {f"{name}, {pieces} pieces": (got, want) for name, got, want in both}
    return pairs


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _recurrence(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(*arguments)[0]


def _forward(
    x: jax.Array,
    log_decay: jax.Array,
    words: jax.Array | None,
    state: jax.Array,
    kind: type[Walk],
    rows: int,
    pieces: int,
    interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    walk = kind(words, rows, pieces, interpret)
    start = state[:, None]
    if pieces > 1:
        start = chain(walk.summary(x, log_decay), state)
    h, ends = walk.states(x, log_decay, start)
    return (h, ends[:, -1]), (log_decay, words, state, h)


def _backward(
    kind: type[Walk], rows: int, pieces: int, interpret: bool, kept: tuple, cotangents: tuple
) -> tuple:
    log_decay, words, state, h = kept
    dh, dfinal = cotangents
    walk = kind(words, rows, pieces, interpret, reverse=True)
    start = dfinal[:, None]
    if pieces > 1:
        start = chain(walk.summary(dh, log_decay), dfinal, reverse=True)
    dx, dlog_decay, ends = walk.gradients(dh, log_decay, h, start, state)
    dwords = None if words is None else np.zeros(words.shape, jax.dtypes.float0)
    return dx, dlog_decay, dwords, ends[:, 0]


_recurrence.defvjp(_forward, _backward)
