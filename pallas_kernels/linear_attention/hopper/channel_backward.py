"""The backward pass with a decay per key channel: a reverse scan, then all chunks at once."""

import functools
from typing import Any

import jax

from pallas_kernels.linear_attention.hopper import table, warm_up
from pallas_kernels.linear_attention.hopper.blocks import C
from pallas_kernels.linear_attention.hopper.channel_backward_chunks import chunk_gradients, value_slices
from pallas_kernels.linear_attention.hopper.channel_backward_scan import reverse_scan
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved, channel_tiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass_forward import one_pass_reverse
from pallas_kernels.linear_attention.hopper.pieces import chain

RUN = 8  # chunks a block of threads of the chunk kernel takes in turn, where there are enough for all


def channel_gradients(
    inputs: Inputs, saved: ChannelSaved, do: jax.Array, d_state: jax.Array | None, choice: table.Choice
) -> tuple:
    """dq, dk, dv; dlog_decay [B, T, HV times slices of V, K], dbeta [B, HV, T] or None, dS_0^T.

    do: [B, T, HV, V] bf16.  d_state: dS^T after the last token or None.
    """
    batch, length, _, value_heads, _, value_dim = inputs.sizes
    tiles, pieces, lead = saved.tiles, 1, None
    scan = functools.partial(reverse_scan, value_tile=choice.value_tile)
    if saved.moves is not None:
        pieces = saved.moves.shape[1]
        walks = warm_up.walks(inputs, pieces)
        walk = walks and walks.first
        *_, alone = scan(inputs, tiles, do, None, pieces=pieces, summary=True, walk=walk)
        d_state = chain(saved.moves, alone, d_state, reverse=True, over=inputs.over)
    elif choice.led > 1 and saved.wrong is None:
        pieces, lead = choice.led, warm_up.leads(inputs, choice.led)[1]
    scan = functools.partial(scan, pieces=pieces, lead=lead)
    state_gradients: Any
    dv: Any
    if saved.wrong is None:
        state_gradients, dv, first = scan(inputs, tiles, do, d_state)
    else:
        otherwise = lambda: scan(inputs, channel_tiles(inputs, keep=True), do, d_state)
        state_gradients, dv, first = one_pass_reverse(inputs, saved.wrong, do, d_state, otherwise=otherwise)
    blocks = batch * value_heads * value_slices(value_dim) * (length // C)  # of one chunk each
    dq, dk, d_log_decay, error = chunk_gradients(
        inputs,
        tiles.norms,
        tiles.carry,
        saved.states,
        state_gradients,
        inputs.v if saved.values is None else saved.values,
        do,
        None if inputs.beta is None else dv,
        run=min(RUN, -(-blocks // table.FILL)),
    )
    d_beta = None
    if inputs.beta is not None and error is not None:
        d_beta = error.reshape(batch, value_heads, -1, length).sum(2) / (inputs.beta * inputs.beta)
    return dq, dk, dv, d_log_decay, d_beta, first[::pieces]
