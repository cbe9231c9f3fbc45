"""The forward pass with a decay per key channel, additive (GLA, HGRN-2) or delta (KDA).

`channel_tiles` (every chunk on its own) makes all operands; `ChannelScan` (chunks in order) is, with S the
state before the chunk and the tiles named as there,
    V' = A beta (V - read_k S)     (additive: V' = V)
    o  = read_q S + scores V'
    S <- carry S + write^T V'.
Few heads: sequences in pieces, as in forward.py; an additive piece multiplies the state channel by channel.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import one_pass_steps, pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.channel_scan import ChannelScan, Scanned
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved, Tiles, channel_tiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass_forward import one_pass_forward, one_pass_kept, serves


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
