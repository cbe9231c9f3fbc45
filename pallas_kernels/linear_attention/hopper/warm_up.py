"""Short walks: with steep decays a state has forgotten what it was a few chunks before
(docs/kernels_channel.md, 6).

Where the norm of what a piece's first few chunks and its last do to a state is below exp(LEAST), what came
before is below the rounding of the state after them: the short scans walk only those, and M of the piece is
0. How far to walk, per piece and head, kernels read on the device. Results differ by less than float32
rounds, unless the state shrinks by e^(LEAST + 16) in so few tokens.

A sequence too short for pieces is cut into runs all the same: the block of threads of a run first walks the
few chunks before it, without outputs, or else all that is before it (`leads`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import table
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs

LEAST = -32.0
ROUNDED = 1 + 2.0**-7  # |k|^2 of the rounded copies of a normalised key is at most this


class Walks(NamedTuple):
    """Of each piece: the chunk that a walk begins with and how many it takes, [B * pieces, HV, 2] int32.

    last: of a scan; first: of a reverse scan, which goes through them backwards.
    forgets: whether the piece is walked in part, [B, pieces, HV].
    """

    last: jax.Array
    first: jax.Array
    forgets: jax.Array


def chunks(run: int) -> int:
    """Of a short walk in a piece of ``run`` chunks."""
    return min(8, run // 4)


def walks(inputs: Inputs, pieces: int) -> Walks | None:
    """None where every piece is walked whole."""
    run = inputs.k.shape[1] // C // pieces
    reach = chunks(run)
    if not table.SHORT_WALKS or inputs.log_decay is None or reach < 2:  # the scans have two buffers to fill
        return None
    first, last = (_bound(inputs, pieces, reach, last=last) <= LEAST for last in (False, True))
    forgets = first & last
    begin = jnp.arange(pieces, dtype=jnp.int32)[None, :, None] * run

    def walk(short: jax.Array) -> jax.Array:
        of = jnp.where(forgets, short, begin), jnp.where(forgets, reach, run)
        return jnp.stack(of, -1).astype(jnp.int32).reshape(-1, forgets.shape[2], 2)

    return Walks(walk(begin + (run - reach)), walk(begin), forgets)


def forget(moves: jax.Array, walks: Walks | None) -> jax.Array:
    """The delta rule's moves [B, pieces, HV, K, K], 0 where a piece forgets."""
    return moves if walks is None else jnp.where(walks.forgets[..., None, None], 0.0, moves)


def leads(inputs: Inputs, runs: int) -> tuple[jax.Array, jax.Array]:
    """How many chunks before each run, and after it (for a reverse scan), it walks first [B * runs, HV]."""
    run = inputs.k.shape[1] // C // runs
    reach = max(1, chunks(run))
    count = jnp.arange(runs, dtype=jnp.int32)[None, :, None]

    def lead(last: bool, all_: jax.Array) -> jax.Array:
        short = jnp.roll(_bound(inputs, runs, reach, last=last) <= LEAST, 1 if last else -1, axis=1)
        walked = jnp.where(short, jnp.minimum(reach, all_), all_)
        return walked.astype(jnp.int32).reshape(-1, short.shape[2])

    return lead(True, count * run), lead(False, (runs - 1 - count) * run)


def _bound(inputs: Inputs, pieces: int, reach: int, *, last: bool) -> jax.Array:
    """The logarithm of the norm of what the last or first ``reach`` chunks do to a state [B, pieces, HV]."""
    batch, length, heads, value_heads, _, _ = inputs.sizes
    span = reach * C

    def end(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, pieces, span, ...]
        x = x.reshape(batch, pieces, length // pieces, *x.shape[2:])
        return (x[:, :, -span:] if last else x[:, :, :span]).astype(F32)

    assert inputs.log_decay is not None
    by_channel = inputs.log_decay.ndim == 4
    steps = end(inputs.log_decay if by_channel else jnp.swapaxes(inputs.log_decay, 1, 2)[..., None])
    if inputs.beta is None:
        bound = jnp.max(jnp.sum(steps, 2), -1)
    else:
        size = end(jnp.swapaxes(inputs.beta, 1, 2)) * ROUNDED
        if not inputs.l2norm:
            size *= jnp.repeat(jnp.sum(end(inputs.k) ** 2, -1), value_heads // heads, axis=-1)
        bound = jnp.sum(jnp.max(steps, -1) + jnp.log(jnp.maximum(jnp.abs(1 - size), 1)), 2)
    if inputs.segment is None or inputs.entering is None:
        return bound
    one = end(inputs.entering)[:, :, 0] == end(inputs.segment)[:, :, -1]
    return jnp.where(one[:, :, None], bound, -jnp.inf)  # nothing gets past a document's start
