"""The passes with a decay per key channel, additive (GLA, HGRN-2) or delta (KDA).

Forward, `channel_tiles` (every chunk on its own) makes all operands; `ChannelScan` (chunks in order) is, with
S the state before the chunk and the tiles named as there,
    V' = A beta (V - read_k S)     (additive: V' = V)
    o  = read_q S + scores V'
    S <- carry S + write^T V'.
Few heads: sequences in pieces, as in forward.py; an additive piece multiplies the state channel by channel.
Backward, a reverse scan, then all chunks at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import one_pass_steps, pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.blocks import C
from pallas_kernels.linear_attention.hopper.channel_backward_chunks import chunk_gradients, value_slices
from pallas_kernels.linear_attention.hopper.channel_backward_scan import reverse_scan
from pallas_kernels.linear_attention.hopper.channel_scan import ChannelScan, Scanned
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved, Tiles, channel_tiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass_forward import (
    one_pass_forward,
    one_pass_kept,
    one_pass_reverse,
    serves,
)

RUN = 8  # chunks a block of threads of the chunk kernel takes in turn, where there are enough for all


def channel_forward(
    inputs: Inputs, *, final: bool, keep: bool, choice: table.Choice | None = None
) -> tuple[Scanned, ChannelSaved | None]:
    """(results, what the backward pass wants if `keep`); `final` for the state after the last token."""
    if choice is None and serves(inputs):
        two, inputs = table.forward(inputs.k.shape, inputs.v.shape), one_pass_steps.as_read(inputs)
        otherwise = lambda: channel_forward(
            one_pass_steps.natural(inputs), final=final, keep=keep, choice=two
        )
        if keep:
            return one_pass_kept(inputs, final=final, otherwise=otherwise)
        return one_pass_forward(inputs, final=final, otherwise=lambda: otherwise()[0]), None
    choice = choice or table.forward(inputs.k.shape, inputs.v.shape)
    tiles = channel_tiles(inputs, keep=keep)
    moves = None
    if choice.pieces > 1 or inputs.over is not None:
        alone = dataclasses.replace(inputs, state=None)
        walks = warm_up.walks(inputs, choice.pieces)
        scan = functools.partial(ChannelScan, pieces=choice.pieces, walk=walks and walks.last)
        summary = scan(alone, tiles, choice.value_tile, mode="summary")().final
        moves = _moves(alone, tiles, choice, walks)
        inputs = dataclasses.replace(
            inputs, state=pieces.chain(moves, summary, inputs.state, over=inputs.over)
        )
    led = choice.led if inputs.over is None else 1
    cut = choice.pieces * led
    lead = warm_up.leads(inputs, led)[0] if led > 1 else None
    out = ChannelScan(inputs, tiles, choice.value_tile, pieces=cut, final=final, keep=keep, lead=lead)()
    if final and cut > 1:
        out = out._replace(final=out.final[cut - 1 :: cut])
    return out, ChannelSaved(tiles, out.states, out.values, moves) if keep else None


def _moves(inputs: Inputs, tiles: Tiles, choice: table.Choice, walks: warm_up.Walks | None) -> jax.Array:
    """What a piece does to S: M^T [B, pieces, HV, K, K], or if additive factors [B, pieces, HV, K]."""
    batch, value_heads, chunks, key_dim = tiles.carry.shape
    if tiles.inverses is None:
        carry = tiles.carry.reshape(batch, value_heads, choice.pieces, chunks // choice.pieces, key_dim)
        return jnp.swapaxes(jnp.prod(carry, axis=3), 1, 2)
    key_tile = min(choice.value_tile, key_dim)
    scan = functools.partial(ChannelScan, pieces=choice.pieces, walk=walks and walks.last)
    moves = scan(inputs, tiles, key_tile, mode="transition")().final
    moves = moves.reshape(batch, choice.pieces, *moves.shape[1:])
    return warm_up.forget(moves, walks)


def channel_gradients(
    inputs: Inputs, saved: ChannelSaved, do: jax.Array, d_state: jax.Array | None, choice: table.Choice
) -> tuple:
    """dq, dk, dv; dlog_decay [B, T, HV times slices of V, K], dbeta [B, HV, T] or None, dS_0^T.

    do: [B, T, HV, V] bf16.  d_state: dS^T after the last token or None.
    """
    batch, length, _, value_heads, _, value_dim = inputs.sizes
    tiles, count, lead = saved.tiles, 1, None
    scan = functools.partial(reverse_scan, value_tile=choice.value_tile)
    if saved.moves is not None:
        count = saved.moves.shape[1]
        walks = warm_up.walks(inputs, count)
        walk = walks and walks.first
        *_, alone = scan(inputs, tiles, do, None, pieces=count, summary=True, walk=walk)
        d_state = pieces.chain(saved.moves, alone, d_state, reverse=True, over=inputs.over)
    elif choice.led > 1 and saved.wrong is None:
        count, lead = choice.led, warm_up.leads(inputs, choice.led)[1]
    scan = functools.partial(scan, pieces=count, lead=lead)
    state_gradients: Any
    dv: Any
    if saved.wrong is None:
        state_gradients, dv, first = scan(inputs, tiles, do, d_state)
    else:
        if saved.steps is not None:
            inputs = dataclasses.replace(inputs, log_decay=saved.steps)
        given = lambda: one_pass_steps.natural(inputs)
        otherwise = lambda: scan(inputs, channel_tiles(given(), keep=True), do, d_state)
        state_gradients, dv, first = one_pass_reverse(inputs, saved.wrong, do, d_state, otherwise=otherwise)
    blocks = batch * value_heads * value_slices(value_dim) * (length // C)  # of one chunk each
    wanted = None if inputs.beta is None else dv
    run = min(RUN, -(-blocks // table.FILL))
    dq, dk, d_log_decay, error = chunk_gradients(inputs, saved, state_gradients, do, wanted, run=run)
    d_beta = None
    if inputs.beta is not None and error is not None:
        d_beta = error.reshape(batch, value_heads, -1, length).sum(2) / (inputs.beta * inputs.beta)
    return dq, dk, dv, d_log_decay, d_beta, first[::count]
