"""A long sequence in pieces that run at once, on one device or on many: what a piece does to the state.

A piece maps the state that it starts from exactly, S_end = M S_start + S_alone, where S_alone is where it
ends when it starts from nothing. So each piece can be summarised without the others (`summarize`), a short
chain over the summaries gives the state that each starts from (`chain`), and the op, given that as its
initial state, then runs all pieces at once. All is differentiable: autodiff of the three is the chain back.

Across devices each summarises its own piece; an all-gather of the summaries and `chain` on each device, of
which it keeps its own state, replace the wait for the device before.

Shape legend: as call.py, and P pieces.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from pallas_kernels.linear_attention import xla
from pallas_kernels.linear_attention.call import Call

Apply = Callable[[jax.Array, jax.Array], jax.Array]


class Summary(NamedTuple):
    """What a piece does to the state, in its compute dtype.

    move: M, a matrix [B, HV, K, K] with the delta rule; additive a factor [B, HV] or, with a decay per key
        channel, [B, HV, K]. Zero where a document starts inside the piece: nothing earlier gets past it.
    alone: S_alone [B, HV, K, V].
    """

    move: jax.Array
    alone: jax.Array


def summarize(call: Call, final_state: Callable[[Call], jax.Array] = xla.final_state) -> Summary:
    """The summary of the tokens of ``call``; its initial state is not read.

    final_state: how the state after the last token is computed; `xla`'s, on any device.
    """
    batch, _, heads, value_dim = call.v.shape
    if call.beta is None:
        alone = final_state(dataclasses.replace(call, initial_state=None))
        return Summary(_factor(call), alone)
    # Columns of the state never meet: those of M are where the identity goes when nothing is written.
    key_dim = call.q.shape[3]
    nothing = jnp.zeros_like(call.v, shape=(*call.v.shape[:3], key_dim))
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=call.compute_dtype), (batch, heads, key_dim, key_dim))
    both = dataclasses.replace(
        call,
        v=jnp.concatenate([call.v, nothing], axis=-1),
        initial_state=jnp.concatenate([call.zeros((batch, heads, key_dim, value_dim)), identity], axis=-1),
    )
    end = final_state(both)
    return Summary(end[..., value_dim:], end[..., :value_dim])


def entered(call: Call, final_state: Callable[[Call], jax.Array] = xla.final_state) -> Call:
    """``call``, of a piece on each device of its axis, with the state that its piece starts from."""
    assert call.axis is not None and call.continues is not None
    alone = dataclasses.replace(call, axis=None, continues=None)
    summary = (jax.lax.all_gather(x, call.axis) for x in summarize(alone, final_state))
    states = chain(*summary, continues=list(call.continues))
    return dataclasses.replace(alone, initial_state=own(states[:-1], call.axis))


def own(states: Sequence[jax.Array] | jax.Array, axis: str) -> jax.Array:
    """Of states, one a device in order, this device's."""
    index, found = jax.lax.axis_index(axis), states[0]
    for piece in range(1, len(states)):
        found = jnp.where(index == piece, states[piece], found)
    return found


def _factor(call: Call) -> jax.Array:
    """M of an additive piece."""
    batch, _, heads, _ = call.v.shape
    factor = call.zeros((batch, heads)) + 1
    if call.log_decay is not None:
        factor = jnp.exp(jnp.sum(call.log_decay, axis=1, dtype=call.compute_dtype))
    starts = call.starts()
    if starts is None:
        return factor
    return jnp.where(jnp.any(starts, axis=1).reshape(batch, *[1] * (factor.ndim - 1)), 0, factor)


def apply(move: jax.Array, state: jax.Array) -> jax.Array:
    """M S for a state [B, HV, K, V]."""
    if move.ndim < 4:
        return move.reshape(*move.shape[:2], -1, 1) * state
    return jnp.matmul(move, state, precision=Precision.HIGHEST)


def chain(
    moves: Sequence[jax.Array],
    alone: Sequence[jax.Array],
    first: jax.Array | None = None,
    *,
    continues: Sequence[jax.Array] | None = None,
    apply: Apply = apply,
) -> list[jax.Array]:
    """The state before each piece and, last, the one after all: P + 1 states as ``alone``'s.

    moves, alone: P summaries' in the order of the pieces; arrays with P as their first axis will do.
    first: the state before the first piece, None for zeros.
    continues: None or, for each piece, bool [B]: whether its first token is of the document of the token
        before it (the first piece's: of that of ``first``); else the piece starts from zeros.
    apply: how a move acts on a state.
    """
    state = jnp.zeros_like(alone[0]) if first is None else first
    states = []
    for piece in range(len(moves)):
        if continues is not None:
            state = jnp.where(continues[piece].reshape(-1, *[1] * (state.ndim - 1)), state, 0)
        states.append(state)
        state = apply(moves[piece], state) + alone[piece]
    return [*states, state]
