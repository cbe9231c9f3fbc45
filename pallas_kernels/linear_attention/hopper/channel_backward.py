"""The backward pass with a decay per key channel: a reverse scan, then all chunks at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import one_pass_steps, table, warm_up
from pallas_kernels.linear_attention.hopper.backward import Gradients
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.channel_backward_chunks import chunk_gradients, value_slices
from pallas_kernels.linear_attention.hopper.channel_backward_scan import reverse_scan
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved, channel_tiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass_forward import one_pass_reverse
from pallas_kernels.linear_attention.hopper.pieces import chain
from pallas_kernels.padding import pad_time

RUN = 8  # chunks a block of threads of the chunk kernel takes in turn, where there are enough for all


def channel_gradients(
    inputs: Inputs,
    saved: ChannelSaved,
    do: jax.Array,
    d_state: jax.Array | None,
    value_tile: int | None = None,
) -> Gradients:
    """do: [B, T, HV, V], T not padded.  d_state: gradient of the final state [B, HV, K, V] or None.

    The gradient of log_decay is [B, T, HV, K], of its dtype.
    """
    choice = table.forward(inputs.k.shape, inputs.v.shape)
    log_decay: Any = inputs.log_decay
    value_tile = value_tile or choice.value_tile
    (batch, length, heads, value_heads, key_dim, _), tokens = inputs.sizes, do.shape[1]
    do = pad_time(do, length).astype(jnp.bfloat16)
    if d_state is not None:
        d_state = jnp.swapaxes(d_state.astype(F32), 2, 3)
    tiles, pieces, lead = saved.tiles, 1, None
    if saved.moves is not None:
        pieces = saved.moves.shape[1]
        walks = warm_up.walks(inputs, pieces)
        *_, alone = reverse_scan(
            inputs, tiles, do, None, value_tile=value_tile, pieces=pieces, summary=True,
            walk=walks and walks.first,
        )  # fmt: skip
        d_state = chain(saved.moves, alone, d_state, reverse=True, over=inputs.over)
    elif choice.led > 1 and saved.wrong is None:
        pieces, lead = choice.led, warm_up.leads(inputs, choice.led)[1]
    scan = functools.partial(reverse_scan, value_tile=value_tile, pieces=pieces, lead=lead)
    state_gradients: Any
    dv: Any
    if saved.wrong is None:
        state_gradients, dv, first = scan(inputs, tiles, do, d_state)
    else:
        inputs = one_pass_steps.as_read(inputs)
        given = lambda: one_pass_steps.natural(inputs)
        otherwise = lambda: scan(inputs, channel_tiles(given(), keep=True), do, d_state)
        state_gradients, dv, first = one_pass_reverse(inputs, saved.wrong, do, d_state, otherwise=otherwise)
    delta = inputs.beta is not None
    blocks = batch * value_heads * value_slices(inputs.v.shape[3]) * (length // C)  # of one chunk each
    dq, dk, d_log_decay, error = chunk_gradients(
        inputs,
        tiles.norms,
        tiles.carry,
        saved.states,
        state_gradients,
        inputs.v if saved.values is None else saved.values,
        do,
        dv if delta else None,
        run=min(RUN, -(-blocks // table.FILL)),
    )

    def added(x: jax.Array, heads: int) -> jax.Array:
        """[B, T, N, K] as [B, tokens, heads, K]: value heads of a group and slices of V are summands."""
        if x.shape[2] != heads:
            x = x.reshape(batch, length, heads, -1, key_dim).astype(F32).sum(3).astype(x.dtype)
        return x[:, :tokens]

    d_beta = None
    if inputs.beta is not None:
        assert error is not None
        error = error.reshape(batch, value_heads, -1, length).sum(2)
        d_beta = jnp.swapaxes(error / (inputs.beta * inputs.beta), 1, 2)[:, :tokens]
    return Gradients(
        added(dq, heads),
        added(dk, heads),
        dv[:, :tokens],
        added(d_log_decay, value_heads).astype(log_decay.dtype),
        d_beta,
        jnp.swapaxes(first[::pieces], 2, 3),
    )
