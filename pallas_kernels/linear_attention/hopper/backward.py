"""The backward pass.

Additive: one reverse scan makes every gradient. Delta: a reverse scan, then all chunks at once; so too with a
decay per key channel (channel.py).
The forward keeps, per chunk of 64 tokens and value head, the state that enters, the inverse A, V' and eight
numbers per token (`gates`); nothing of the forward is recomputed but the 64 x 64 products of q and k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.backward_additive import additive_gradients
from pallas_kernels.linear_attention.hopper.backward_chunks import chunk_gradients
from pallas_kernels.linear_attention.hopper.backward_scan import reverse_scan
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.channel import channel_gradients
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved
from pallas_kernels.linear_attention.hopper.forward import Saved
from pallas_kernels.linear_attention.hopper.hard_queries import hard_queries
from pallas_kernels.linear_attention.hopper.head_tiles import HeadTiles
from pallas_kernels.linear_attention.hopper.inputs import Chunks, Inputs
from pallas_kernels.linear_attention.hopper.wide_chunks import wide_gradients
from pallas_kernels.linear_attention.hopper.wide_scan import wide_reverse
from pallas_kernels.padding import pad_time

WIDEST_CHUNKS = 128  # channels and values of a head whose chunk kernel has all in shared memory at once


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
    saved: Saved | ChannelSaved,
    do: jax.Array,
    d_state: jax.Array | None,
    choice: table.Choice | None = None,
) -> Gradients:
    """do: [B, T, HV, V], T not padded.  d_state: gradient of the final state [B, HV, K, V] or None.

    The gradient of a decay per key channel is [B, T, HV, K], of the decay's dtype.
    """
    (batch, length, heads, value_heads, key_dim, _), tokens = inputs.sizes, do.shape[1]
    by_channel = isinstance(saved, ChannelSaved)
    do = pad_time(do, length).astype(jnp.bfloat16)
    if d_state is not None:
        d_state = jnp.swapaxes(d_state.astype(F32), 2, 3)
    make: Any = channel_gradients if by_channel else _additive if inputs.beta is None else _delta
    if choice is None and by_channel:
        choice = table.forward(inputs.k.shape, inputs.v.shape)
    choice = choice or table.backward(inputs.k.shape, inputs.v.shape, inputs.beta is not None)
    dq, dk, dv, d_log_decay, d_beta, first = make(inputs, saved, do, d_state, choice)

    def added(x: jax.Array, heads: int) -> jax.Array:
        """[B, T, N, K] as [B, tokens, heads, K]: value heads of a group and slices of V are summands."""
        if x.shape[2] != heads:
            x = x.reshape(batch, length, heads, -1, key_dim).astype(F32).sum(3).astype(x.dtype)
        return x[:, :tokens]

    def per_token(x: jax.Array | None) -> jax.Array | None:  # [B, HV, T] -> [B, T, HV]
        return None if x is None else jnp.swapaxes(x, 1, 2)[:, :tokens]

    steps: Any = inputs.log_decay
    return Gradients(
        added(dq, heads),
        added(dk, heads),
        dv[:, :tokens],
        added(d_log_decay, value_heads).astype(steps.dtype) if by_channel else per_token(d_log_decay),
        per_token(d_beta),
        jnp.swapaxes(first, 2, 3),
    )


def _additive(
    inputs: Inputs, saved: Saved, do: jax.Array, d_state: jax.Array | None, choice: table.Choice
) -> tuple:
    """dq, dk, dv, dlog_decay [B, HV, T], no dbeta, dS_0^T."""
    count = choice.pieces
    if count > 1 or inputs.over is not None:
        scan = functools.partial(reverse_scan, inputs, None, None, do, None)
        walks = warm_up.walks(inputs, count)
        *_, alone = scan(value_tile=choice.value_tile, pieces=count, summary=True, walk=walks and walks.first)
        d_state = pieces.chain(pieces.factors(inputs, count), alone, d_state, reverse=True, over=inputs.over)
    *out, first = additive_gradients(inputs, saved.states, do, d_state, pieces=count)
    return *out, None, first[::count]


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
