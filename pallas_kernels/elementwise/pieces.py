"""What a stretch of tokens does to the state: h_end = decay h_start + alone (a reset: alone).

So the pieces of a long sequence, on one device or many, run at once: `piece` of each, `chain` for the state
before each, then `elementwise_recurrence` of each from there. Exact up to the order of float32 additions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Piece(NamedTuple):
    """decay, alone: [..., F].  reset: None (never) or bool [..., 1], whether a document starts inside.

    A reset is a select: decay and the state before it may then be any number, or none.
    """

    decay: jax.Array
    alone: jax.Array
    reset: jax.Array | None


def piece(x: jax.Array, log_decay: jax.Array, starts: jax.Array | None = None) -> Piece:
    """The stretch x, log_decay [B, T, F] as a whole, [B, F], in the dtype that the op computes in.

    starts: bool [B, T], where a document starts; the first token may.
    """
    dtype = jnp.result_type(jnp.float32, x.dtype, log_decay.dtype)
    resets = None if starts is None else starts[..., None]
    whole: Piece = Piece(jnp.exp(log_decay.astype(dtype)), x.astype(dtype), resets)
    while (length := whole.decay.shape[1]) > 1:
        half = (length + 1) // 2  # an odd one out stays in front
        left, right = (jax.tree.map(lambda x, n=n: x[:, length % 2 + n :: 2], whole) for n in (0, 1))
        joined = join(left, right)
        if length % 2:
            odd = jax.tree.map(lambda x: x[:, :1], whole)
            joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), odd, joined)
        whole = joined
        assert whole.decay.shape[1] == half
    return jax.tree.map(lambda x: x[:, 0], whole)


def join(left: tuple, right: tuple) -> Piece:
    """The stretch ``left`` followed by ``right``; associative."""
    first, second = Piece(*left), Piece(*right)
    reset = None if first.reset is None or second.reset is None else first.reset | second.reset
    return Piece(first.decay * second.decay, through(second, first.alone), reset)


def through(piece: Piece, state: jax.Array) -> jax.Array:
    """The state after the piece, from the ``state`` [..., F] before it."""
    after = piece.decay * state + piece.alone
    return after if piece.reset is None else jnp.where(piece.reset, piece.alone, after)


def chain(pieces: Piece, first: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The state before each piece [B, N, F], for ``pieces`` [B, N, F] and the state ``first`` [B, F].

    reverse: the gradient of the state after each piece, for pieces whose ``alone`` is what the gradients of
        their outputs give that of the state before them, and ``first``, that of the last state.
    """

    def step(state: jax.Array, piece: Piece) -> tuple[jax.Array, jax.Array]:
        return through(piece, state), state

    in_order = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pieces)
    return jnp.moveaxis(jax.lax.scan(step, first, in_order, reverse=reverse)[1], 0, 1)
