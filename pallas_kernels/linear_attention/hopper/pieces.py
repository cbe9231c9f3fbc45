"""Sequences cut into pieces that run at once on one GPU, and the chain over pieces.

See linear_attention/pieces.py. The gradient of the state goes back through the transposed map: dS_start = M^T
dS_end + dS_alone, with the same M. Short scans give S_alone, dS_alone and M of all pieces at once; `chain`
joins them; the full scan then starts every piece where it is.
States are transposed, [V, K], as everywhere in the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention import pieces
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Over


def chain(
    moves: jax.Array,
    alone: jax.Array,
    first: jax.Array | None,
    *,
    reverse: bool = False,
    over: Over | None = None,
) -> jax.Array:
    """S^T before each piece, or with `reverse` dS^T after each piece: [B * pieces, HV, V, K] float32.

    moves: a factor [B, pieces, HV] or [B, pieces, HV, K], or M^T [B, pieces, HV, K, K].
    alone: [B * pieces, HV, V, K]: S_alone^T, or dS_alone^T.
    first: None (zeros) or [B, HV, V, K]: S^T before the first piece, or dS^T after the last.
    over: None, or the first piece goes on from other devices, which all call this at once.
    """
    batch, count = moves.shape[:2]
    alone = alone.reshape(batch, count, *alone.shape[1:])
    order = range(count)[::-1] if reverse else range(count)

    def apply(move: jax.Array, state: jax.Array) -> jax.Array:
        if move.ndim < 4:
            return state * move.reshape(*move.shape[:2], 1, -1)
        spec = "bhvk,bhjk->bhvj" if reverse else "bhvk,bhkj->bhvj"
        return jnp.einsum(spec, state, move, precision=lax.Precision.HIGHEST)

    in_order = [moves[:, piece] for piece in order], [alone[:, piece] for piece in order]
    if over is not None:
        end = pieces.chain(*in_order, first, apply=apply)[-1]
        first = _entering(_product(moves), end, over, apply, reverse)
    states = pieces.chain(*in_order, first, apply=apply)[:-1]
    states = states[::-1] if reverse else states
    return jnp.stack(states, 1).reshape(batch * count, *states[0].shape[1:])


def _product(moves: jax.Array) -> jax.Array:
    """What all pieces of a device do, from `chain`'s moves: [B, HV, ...]."""
    if moves.ndim < 5:
        return jnp.prod(moves, axis=1)
    product = moves[:, 0]
    for piece in range(1, moves.shape[1]):
        product = jnp.einsum("bhvk,bhkj->bhvj", product, moves[:, piece], precision=lax.Precision.HIGHEST)
    return product


def _entering(move: jax.Array, alone: jax.Array, over: Over, apply: pieces.Apply, reverse: bool) -> jax.Array:
    """`chain`'s first of this device, from what every device does."""
    moves, ends = (lax.all_gather(x, over.axis) for x in (move, alone))
    continues = over.continues
    if reverse:  # from the last device on; what a device gets is cut off where the one after it begins anew
        moves, ends = moves[::-1], ends[::-1]
        continues = jnp.roll(continues, -1, axis=0)[::-1]
    states = pieces.chain(moves, ends, continues=list(continues), apply=apply)[:-1]
    return pieces.own(states[::-1] if reverse else states, over.axis)


def factors(inputs: Inputs, count: int) -> jax.Array:
    """What an additive piece multiplies the state by [B, pieces, HV]."""
    batch, length, heads = inputs.k.shape[0], inputs.k.shape[1], inputs.v.shape[2]
    factor = jnp.ones((batch, count, heads), F32)
    if inputs.log_decay is not None:
        steps = inputs.log_decay.reshape(batch, heads, count, length // count)
        factor = jnp.swapaxes(jnp.exp(jnp.sum(steps, axis=-1)), 1, 2)
    if inputs.segment is not None:
        run = length // count
        entering: Any = inputs.entering
        one = entering[:, ::run] == inputs.segment[:, run - 1 :: run]
        factor = jnp.where(one[:, :, None], factor, 0.0)
    return factor
