"""Sequences cut over devices (`mesh.context`): what the piece on each is given by its neighbours.

Only what an op cannot compute from its own tokens travels, within a `sharding.per_shard` whose arrays are cut
along "time": a recurrence's state (all-gather of what each piece does to it, `pallas_kernels.*.pieces`), the
last inputs of the piece before (halo of a convolution or window), all keys and values (softmax attention).
Ids and positions are of the whole row, made before it was cut, so a document may lie across any border. The
gradients are autodiff's: of an all-gather a reduce-scatter, of a shift the shift back.

Every function here but `over` is called within `per_shard` with ``axis`` from `over`.

Shape legend: B rows, T tokens of a piece, N pieces, F channels, H heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import sharding
from pallas_kernels.elementwise import pieces as elementwise
from pallas_kernels.linear_attention import pieces as linear
from pallas_kernels.linear_attention.op import normalize
from pallas_kernels.linear_attention.pieces import own

Axis = str | None


def over(length: int) -> Axis:
    """The mesh axis that sequences of ``length`` tokens are cut over here; None where they stay whole.

    They do without a mesh, and where its size does not divide them: tokens and prompts of a decode cache.
    """
    parts = sharding.parts("time")
    return "context" if parts > 1 and length % parts == 0 else None


def gather(x: jax.Array, axis: str) -> jax.Array:
    """The whole of x [B, T, ...]: [B, N * T, ...]."""
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def before(x: jax.Array, size: int, axis: str, first: jax.Array | None = None) -> jax.Array:
    """The ``size`` tokens before the piece x [B, T, ...]: [B, size, ...]; ``first`` or zeros before the row.

    From as many neighbours as it takes.
    """
    if not size:
        return x[:, :0]
    count, length = jax.lax.axis_size(axis), x.shape[1]
    hops = min(-(-size // length), count - 1)
    came = []
    for hop in range(hops, 0, -1):
        taken = x[:, -(size - (hop - 1) * length) :] if hop == hops else x
        came.append(jax.lax.ppermute(taken, axis, [(i, i + hop) for i in range(count - hop)]))
    halo = jnp.concatenate(came, axis=1)
    halo = jnp.pad(halo, [(0, 0), (size - halo.shape[1], 0)] + [(0, 0)] * (x.ndim - 2))
    if first is None:
        return halo
    # Device i has i * T tokens before it; what is missing of ``size`` are the last of ``first``.
    padded = jnp.pad(first, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2))
    have = jnp.minimum(jax.lax.axis_index(axis) * length, size)
    return halo + jax.lax.dynamic_slice_in_dim(padded, have, size, axis=1)


def continues(segment_ids: jax.Array, axis: str) -> jax.Array:
    """bool [N, B]: whether each piece's first token is of the document of the token before it; the first's
    of that of the state that its row is given."""
    ends = jnp.stack([segment_ids[:, 0], segment_ids[:, -1]])
    firsts, lasts = jnp.moveaxis(jax.lax.all_gather(ends, axis), 1, 0)
    return jnp.concatenate([jnp.ones_like(firsts[:1], bool), firsts[1:] == lasts[:-1]])


def linear_states(
    state: jax.Array | None, axis: str, *, segment_ids: jax.Array, **call: Any
) -> tuple[jax.Array, jax.Array]:
    """(the state before this piece, that after the row), [B, H, K, V], of the matrix recurrence.

    state: before the row, or None for zeros.  call: arguments of `linear_attention`, of this piece.
    """
    summary = linear.summarize(normalize(segment_ids=segment_ids, **call))
    moves, alone = (jax.lax.all_gather(x, axis) for x in summary)
    states = linear.chain(moves, alone, state, continues=list(continues(segment_ids, axis)))
    # The chain gives what a piece starts from where it continues its document, zeros where it does not.
    return own(states[:-1], axis), states[-1]


def elementwise_states(
    piece: elementwise.Piece, starts: jax.Array, state: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """(the state before this piece, that after the row), [B, F], of the element-wise recurrence.

    piece: what this piece does to the state, with its `starts`.  state: before the row.
    """
    pieces = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1), piece)
    states = elementwise.chain(pieces, state)
    last = jax.tree.map(lambda x: x[:, -1], pieces)
    mine = jax.lax.dynamic_index_in_dim(states, jax.lax.axis_index(axis), 1, keepdims=False)
    return jnp.where(starts[:, :1], 0, mine), elementwise.through(last, states[:, -1])


def starts(segment_ids: jax.Array, axis: str) -> jax.Array:
    """bool [B, T]: where a document starts, the piece's first token included; not the row's."""
    begins = ~own(continues(segment_ids, axis), axis)
    inside = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([begins[:, None], inside], axis=1)


def running_max(
    scan: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    log_decay: jax.Array, x: jax.Array, state: jax.Array, axis: str,
) -> jax.Array:  # fmt: skip
    """m_t = max(m_{t-1} + log_decay_t, x_t) [B, T, H] from ``state`` [B, H] before the row.

    scan: (log_decay, x) -> both accumulated along T.
    """
    sums, reached = scan(log_decay, x)
    all_sums, all_reached = (jax.lax.all_gather(a[:, -1], axis) for a in (sums, reached))
    states = [state]
    for piece in range(len(all_sums) - 1):
        states.append(jnp.maximum(states[-1] + all_sums[piece], all_reached[piece]))
    return jnp.maximum(own(states, axis)[:, None] + sums, reached)
