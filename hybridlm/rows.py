"""Where each token of a row stands: its document and its place in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Packing of a batch of rows. B rows of T tokens; in a decode step the T axis is absent.

    segment_ids: int32 [B, T]; equal neighbours belong to one document, a change starts another; 0 is padding.
    positions: int32 [B, T]; 0 at each document's first token, counting up inside it. A row whose first
        position is not 0 continues the document of the state (decode cache) that it is called with.
    """

    segment_ids: jax.Array
    positions: jax.Array


def single_document(batch: int, length: int) -> Rows:
    """Rows that hold one unpadded document each."""
    shape = (batch, length)
    return Rows(jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape))


def continued(state: jax.Array, rows: Rows) -> jax.Array:
    """``state`` [B, ...] with the rows zeroed whose first token starts a new document."""
    first = rows.positions if rows.positions.ndim == 1 else rows.positions[:, 0]
    starts = (first == 0).reshape(first.shape + (1,) * (state.ndim - 1))
    return jnp.where(starts, jnp.zeros((), state.dtype), state)


def cut(x: jax.Array, size: int, **pad: Any) -> jax.Array:
    """[B, T, ...] as [ceil(T / size), B, size, ...], for a scan; pad: what `jnp.pad` fills the last with."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * len(rest)], **pad)
    return jnp.moveaxis(x.reshape(batch, -1, size, *rest), 1, 0)


def joined(pieces: jax.Array, length: int) -> jax.Array:
    """The inverse of `cut`: of [N, B, size, ...] the first ``length`` tokens, [B, length, ...]."""
    _, batch, _, *rest = pieces.shape
    return jnp.moveaxis(pieces, 0, 1).reshape(batch, -1, *rest)[:, :length]
