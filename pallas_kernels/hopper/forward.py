"""The forward pass with no decay or one decay per head, additive or delta.

`chunk_inverses` (delta only; every chunk on its own): A = (I + L)^-1 with
    L_ij = beta_i k_i.k_j exp(G_i - G_j), j < i, pairs of one document.
`Scan` (chunks in order): with S the state before the chunk and e, f as in `blocks` (READ_K, WRITE),
    V' = A beta (V - e K S)     (additive: V' = V)
    o  = scale (e Q S + P V'),  P_ij = q_i.k_j exp(G_i - G_j), j <= i, pairs of one document
    S <- exp(G_C) [one document] S + (f K)^T V'.
W = A beta e K and U = A beta V, the usual intermediates of the delta rule, never exist.

Where sequences times heads leave most of the GPU idle, each sequence is cut into pieces. A piece maps the
state it starts from linearly: S_end = M S_start + S_alone. Two short scans give S_alone and M of every
piece, `_starts` chains them, and the full scan then runs all pieces at once, each from its exact start.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import table
from pallas_kernels.hopper.blocks import F32
from pallas_kernels.hopper.forward_inverse import chunk_inverses
from pallas_kernels.hopper.forward_scan import Scan, Scanned
from pallas_kernels.hopper.inputs import Inputs, prepare

__all__ = ["Inputs", "forward_pass", "prepare"]


def forward_pass(
    inputs: Inputs, *, final: bool, keep: bool, choice: table.Choice | None = None
) -> tuple[Scanned, jax.Array | None]:
    """(results, A): `final` for the state after the last token, `keep` for what the backward pass wants."""
    choice = choice or table.forward(inputs.k.shape, inputs.v.shape)
    inverses = None if inputs.beta is None else chunk_inverses(inputs)
    if choice.pieces > 1:
        inputs = dataclasses.replace(inputs, state=_starts(inputs, inverses, choice))
    out = Scan(inputs, inverses, choice.value_tile, choice.pieces, "output", final, keep)()
    if final and choice.pieces > 1:
        out = out._replace(final=out.final[choice.pieces - 1 :: choice.pieces])
    return out, inverses


def _starts(inputs: Inputs, inverses: jax.Array | None, choice: table.Choice) -> jax.Array:
    """S^T before each piece [B * pieces, HV, V, K] float32."""
    batch, pieces = inputs.k.shape[0], choice.pieces
    alone = dataclasses.replace(inputs, state=None)
    summary = Scan(alone, inverses, choice.value_tile, pieces, "summary")().final
    summary = summary.reshape(batch, pieces, *summary.shape[1:])
    if inverses is not None:
        key_tile = min(choice.value_tile, inputs.k.shape[-1])
        moves = Scan(alone, inverses, key_tile, pieces, "transition")().final
        moves = moves.reshape(batch, pieces, *moves.shape[1:])
    else:
        moves = _carried(inputs, pieces)
    start = jnp.zeros_like(summary[:, 0]) if inputs.state is None else inputs.state
    starts = [start]
    for piece in range(pieces - 1):  # S^T <- S^T M^T + S_alone^T
        if inverses is None:
            start = start * moves[:, piece, :, None, None] + summary[:, piece]
        else:
            moved = jnp.einsum("bhvk,bhkj->bhvj", start, moves[:, piece], precision=lax.Precision.HIGHEST)
            start = moved + summary[:, piece]
        starts.append(start)
    return jnp.stack(starts, 1).reshape(batch * pieces, *start.shape[1:])


def _carried(inputs: Inputs, pieces: int) -> jax.Array:
    """The factor [B, pieces, HV] that an additive piece applies to the state it starts from."""
    batch, length, heads = inputs.k.shape[0], inputs.k.shape[1], inputs.v.shape[2]
    factor = jnp.ones((batch, pieces, heads), F32)
    if inputs.log_decay is not None:
        steps = inputs.log_decay.reshape(batch, heads, pieces, length // pieces)
        factor = jnp.swapaxes(jnp.exp(jnp.sum(steps, axis=-1)), 1, 2)
    if inputs.segment is not None:
        runs = length // pieces
        entering: Any = inputs.entering
        one = entering[:, ::runs] == inputs.segment[:, runs - 1 :: runs]
        factor = jnp.where(one[:, :, None], factor, 0.0)
    return factor
