"""Sequences cut into pieces that run at once: what a piece does to the state, and the chain over pieces.

A piece of a sequence maps the state it starts from exactly: S_end = M S_start + S_alone. Its gradient goes
back through the transposed map: dS_start = M^T dS_end + dS_alone, with the same M. Short scans give S_alone,
dS_alone and M of all pieces at once; `chain` joins them; the full scan then starts every piece where it is.
States are transposed, [V, K], as everywhere in the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.inputs import Inputs


def chain(moves: jax.Array, alone: jax.Array, first: jax.Array | None, *, reverse: bool = False) -> jax.Array:
    """S^T before each piece, or with `reverse` dS^T after each piece: [B * pieces, HV, V, K] float32.

    moves: a factor [B, pieces, HV] or [B, pieces, HV, K], or M^T [B, pieces, HV, K, K].
    alone: [B * pieces, HV, V, K]: S_alone^T, or dS_alone^T.
    first: None (zeros) or [B, HV, V, K]: S^T before the first piece, or dS^T after the last.
    """
    batch, pieces = moves.shape[:2]
    alone = alone.reshape(batch, pieces, *alone.shape[1:])
    order = range(pieces)[::-1] if reverse else range(pieces)

    def through(state: jax.Array, piece: int) -> jax.Array:
        move = moves[:, piece]
        if move.ndim < 4:
            return state * move.reshape(*move.shape[:2], 1, -1)
        spec = "bhvk,bhjk->bhvj" if reverse else "bhvk,bhkj->bhvj"
        return jnp.einsum(spec, state, move, precision=lax.Precision.HIGHEST)

    state = first
    states: list[Any] = [jnp.zeros_like(alone[:, 0]) if first is None else first]
    for piece in order[:-1]:
        state = alone[:, piece] if state is None else through(state, piece) + alone[:, piece]
        states.append(state)
    states = states[::-1] if reverse else states
    return jnp.stack(states, 1).reshape(batch * pieces, *states[0].shape[1:])


def factors(inputs: Inputs, pieces: int) -> jax.Array:
    """What an additive piece multiplies the state by [B, pieces, HV]."""
    batch, length, heads = inputs.k.shape[0], inputs.k.shape[1], inputs.v.shape[2]
    factor = jnp.ones((batch, pieces, heads), F32)
    if inputs.log_decay is not None:
        steps = inputs.log_decay.reshape(batch, heads, pieces, length // pieces)
        factor = jnp.swapaxes(jnp.exp(jnp.sum(steps, axis=-1)), 1, 2)
    if inputs.segment is not None:
        run = length // pieces
        entering: Any = inputs.entering
        one = entering[:, ::run] == inputs.segment[:, run - 1 :: run]
        factor = jnp.where(one[:, :, None], factor, 0.0)
    return factor
