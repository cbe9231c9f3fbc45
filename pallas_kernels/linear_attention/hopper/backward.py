"""The backward pass with no decay or one decay per head.

Additive: one reverse scan makes every gradient. Delta: a reverse scan, then all chunks at once.
The forward keeps, per chunk of 64 tokens and value head, the state that enters, the inverse A, V' and eight
numbers per token (`gates`); nothing of the forward is recomputed but the 64 x 64 products of q and k.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.backward_additive import additive_gradients
from pallas_kernels.linear_attention.hopper.backward_chunks import chunk_gradients
from pallas_kernels.linear_attention.hopper.backward_scan import reverse_scan
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.hard_queries import hard_queries
from pallas_kernels.linear_attention.hopper.head_tiles import HeadTiles
from pallas_kernels.linear_attention.hopper.inputs import Chunks, Inputs
from pallas_kernels.linear_attention.hopper.two_parts import Inverse
from pallas_kernels.linear_attention.hopper.wide_chunks import wide_gradients
from pallas_kernels.linear_attention.hopper.wide_scan import wide_reverse
from pallas_kernels.padding import pad_time

WIDEST_CHUNKS = 128  # channels and values of a head whose chunk kernel has all in shared memory at once


class Saved(NamedTuple):
    """What the forward keeps beside its inputs; T is padded to whole chunks.

    states: S^T before each chunk, [B, HV, T/C, V, K] bf16.
    None if additive: gates [B, HV, T/C, 8, C] float32 (see blocks), inverses (`two_parts.Inverse`),
    values V' [B, T, HV, V] bf16.
    moves: what each piece does to the state (pieces.py), None if the forward took sequences whole.
    scores: P of `HeadTiles`, K = 256 only.
    """

    gates: jax.Array | None
    states: jax.Array
    inverses: Inverse | None = None
    values: jax.Array | None = None
    moves: jax.Array | None = None
    scores: jax.Array | None = None


class Gradients(NamedTuple):
    """Gradients in the shapes of the op's arguments, float32 but for q, k, v."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    state: jax.Array


def gradients(
    inputs: Inputs,
    saved: Saved,
    do: jax.Array,
    d_state: jax.Array | None,
    choice: table.Choice | None = None,
) -> Gradients:
    """do: [B, T, HV, V], T not padded.  d_state: gradient of the final state [B, HV, K, V] or None."""
    choice = choice or table.backward(inputs.k.shape, inputs.v.shape, saved.inverses is not None)
    batch, length, heads, key_dim = inputs.k.shape
    value_heads, tokens = inputs.v.shape[2], do.shape[1]
    do = pad_time(do, length).astype(jnp.bfloat16)
    if d_state is not None:
        d_state = jnp.swapaxes(d_state.astype(F32), 2, 3)
    if saved.inverses is None:
        dq, dk, dv, d_log_decay, first = _additive(inputs, saved, do, d_state, choice)
        d_beta = None
    else:
        dq, dk, dv, d_log_decay, d_beta, first = _delta(inputs, saved, do, d_state, choice)

    def over_group(x: jax.Array) -> jax.Array:
        if value_heads == heads:
            return x[:, :tokens]
        grouped = x.reshape(batch, length, heads, value_heads // heads, key_dim).astype(F32)
        return grouped.sum(3).astype(x.dtype)[:, :tokens]

    def per_token(x: jax.Array | None) -> jax.Array | None:  # [B, HV, T] -> [B, T, HV]
        return None if x is None else jnp.swapaxes(x, 1, 2)[:, :tokens]

    return Gradients(
        over_group(dq),
        over_group(dk),
        dv[:, :tokens],
        per_token(d_log_decay),
        per_token(d_beta),
        jnp.swapaxes(first, 2, 3),
    )


def _additive(
    inputs: Inputs, saved: Saved, do: jax.Array, d_state: jax.Array | None, choice: table.Choice
) -> tuple:
    """dq, dk, dv, dlog_decay [B, HV, T], dS_0^T."""
    count = choice.pieces
    if count > 1 or inputs.over is not None:
        scan = functools.partial(reverse_scan, inputs, None, None, do, None)
        walks = warm_up.walks(inputs, count)
        *_, alone = scan(value_tile=choice.value_tile, pieces=count, summary=True, walk=walks and walks.first)
        d_state = pieces.chain(pieces.factors(inputs, count), alone, d_state, reverse=True, over=inputs.over)
    *out, first = additive_gradients(inputs, saved.states, do, d_state, pieces=count)
    return *out, first[::count]


def _delta(
    inputs: Inputs, saved: Saved, do: jax.Array, d_state: jax.Array | None, choice: table.Choice
) -> tuple:
    """dq, dk, dv, dlog_decay and dbeta [B, HV, T], dS_0^T."""
    assert saved.gates is not None and saved.inverses is not None and saved.values is not None
    scan = functools.partial(
        reverse_scan, inputs, saved.gates, saved.inverses, do, value_tile=choice.value_tile
    )
    if saved.scores is not None:
        tiles = HeadTiles(saved.gates, saved.scores, saved.inverses)
        state_gradients, dv, first = wide_reverse(inputs, tiles, do, d_state)
    elif saved.moves is None:
        state_gradients, dv, first = scan(d_state)
    else:
        count = saved.moves.shape[1]
        walks = warm_up.walks(inputs, count)
        *_, alone = scan(None, pieces=count, summary=True, walk=walks and walks.first)
        ends = pieces.chain(saved.moves, alone, d_state, reverse=True, over=inputs.over)
        state_gradients, dv, first = scan(ends, pieces=count)
        first = first[::count]
    wide = max(inputs.k.shape[3], inputs.v.shape[3]) > WIDEST_CHUNKS
    given = Chunks(saved.gates, saved.states, state_gradients, saved.values, do, dv)
    dq, dk, per_token = (wide_gradients if wide else chunk_gradients)(inputs, given)
    dq = hard_queries(inputs, saved.inverses, given, dq)
    d_log_decay = None if inputs.log_decay is None else per_token[:, :, 0]
    return dq, dk, dv, d_log_decay, per_token[:, :, 1], first
