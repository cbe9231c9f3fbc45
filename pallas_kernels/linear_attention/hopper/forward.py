"""The forward pass with no decay or one decay per head, additive or delta.

`chunk_inverses` (delta only; every chunk on its own): A - I, A = (I + L)^-1 with
    L_ij = beta_i k_i.k_j exp(G_i - G_j), j < i, pairs of one document.
`Scan` (chunks in order): with S the state before the chunk and e, f as in `blocks` (READ_K, WRITE),
    V' = A beta (V - e K S)     (additive: V' = V)
    o  = scale (e Q S + P V'),  P_ij = q_i.k_j exp(G_i - G_j), j <= i, pairs of one document
    S <- exp(G_C) [one document] S + (f K)^T V'.
W = A beta e K and U = A beta V, the usual intermediates of the delta rule, never exist.

Where sequences times heads leave most of the GPU idle, each sequence is cut into pieces (pieces.py): a short
scan gives what every piece does to the state, and the full scan runs all pieces at once.

With K = 256 (delta only) `head_tiles` and `wide_scan` take the places of `chunk_inverses` and `Scan`.
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.linear_attention.hopper import pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.forward_scan import Scan, Scanned
from pallas_kernels.linear_attention.hopper.head_tiles import chunk_inverses, head_tiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.two_parts import Inverse
from pallas_kernels.linear_attention.hopper.wide_scan import wide_scan


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


def forward_pass(
    inputs: Inputs, *, final: bool, keep: bool, choice: table.Choice | None = None
) -> tuple[Scanned, Saved | None]:
    """(results, what the backward pass wants if `keep`); `final` for the last state."""
    if inputs.k.shape[3] > table.WIDEST_KEY:
        tiles = head_tiles(inputs)
        out = wide_scan(inputs, tiles, final=final, keep=keep)
        saved = Saved(tiles.gates, out.states, tiles.inverses, out.values, scores=tiles.scores)
        return out, saved if keep else None
    choice = choice or table.forward(inputs.k.shape, inputs.v.shape)
    inverses = None if inputs.beta is None else chunk_inverses(inputs)
    moves = None
    if choice.pieces > 1 or inputs.over is not None:
        moves, starts = _starts(inputs, inverses, choice)
        inputs = dataclasses.replace(inputs, state=starts)
    out = Scan(inputs, inverses, choice.value_tile, pieces=choice.pieces, final=final, keep=keep)()
    if final and choice.pieces > 1:
        out = out._replace(final=out.final[choice.pieces - 1 :: choice.pieces])
    return out, Saved(out.gates, out.states, inverses, out.values, moves) if keep else None


def _starts(inputs: Inputs, inverses: Inverse | None, choice: table.Choice) -> tuple[jax.Array, jax.Array]:
    """What each piece does to the state, and S^T before each piece [B * pieces, HV, V, K] float32."""
    alone = dataclasses.replace(inputs, state=None)
    walks = warm_up.walks(inputs, choice.pieces)
    summary = Scan(
        alone, inverses, choice.value_tile, pieces=choice.pieces, mode="summary", walk=walks and walks.last
    )()
    if inverses is None:
        moves = pieces.factors(inputs, choice.pieces)
    else:
        moves = summary.moves.reshape(inputs.k.shape[0], choice.pieces, *summary.moves.shape[1:])
        moves = warm_up.forget(moves, walks)
    return moves, pieces.chain(moves, summary.final, inputs.state, over=inputs.over)
