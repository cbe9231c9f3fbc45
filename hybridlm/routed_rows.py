"""Rows of tokens that were chosen for each of several memories, in their order, one row a memory.

Shape legend: B batch, M memories, T tokens, D channels, H heads, V their channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows


class Packed(NamedTuple):
    """How memories' tokens stand at the front of rows of their own, behind the inputs that they keep.

    order, place: int32 [B, M, T], the token at each place, and each token's place.
    valid: [B, M, T], whether there is a token at a place.  rows: of [B, M, taps - 1 + T] places.
    goes_on: [B, M], whether a memory's last document is the row's.
    last_at: [B, M, taps - 1], places of the last inputs.
    last_seen: of the same, whether they are of the row's last document.
    """

    order: jax.Array
    place: jax.Array
    valid: jax.Array
    rows: Rows
    goes_on: jax.Array
    last_at: jax.Array
    last_seen: jax.Array

    def gather(self, x_BTD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTD[:, None], self.order[..., None], axis=2)

    def scatter(self, o_BMTHV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(o_BMTHV, self.place[..., None, None], axis=2)

    def last(self, x_BMTD: jax.Array) -> jax.Array:
        """What the convolutions may see after the row, of the inputs [B, M, taps - 1 + T, D]."""
        found = jnp.take_along_axis(x_BMTD, self.last_at[..., None], axis=2)
        return jnp.where(self.last_seen[..., None], found, 0)


def pack(chosen_BMT: jax.Array, rows: Rows, kept: int) -> Packed:
    """chosen_BMT: bool.  kept: inputs before the row that a memory keeps."""
    document = jnp.cumsum(rows.positions == 0, axis=1)[:, None]  # 0: that of what came before the row
    order = jnp.argsort(~chosen_BMT, axis=2, stable=True)
    count, index = chosen_BMT.sum(2, keepdims=True), jnp.arange(chosen_BMT.shape[2])
    valid = index < count
    own = jnp.where(valid, jnp.take_along_axis(document, order, axis=2), 0)
    last = own.max(2, keepdims=True)
    own = jnp.where(valid, own, last)
    begins = own != jnp.pad(own, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    start = jax.lax.cummax(jnp.where(begins, index, -kept - 1), axis=2)
    front = lambda x, value: jnp.pad(x, [(0, 0), (0, 0), (kept, 0)], constant_values=value)
    documents, last_at = front(own, 0), count + jnp.arange(kept)
    seen = jnp.take_along_axis(documents, last_at, axis=2) == document[..., -1:]
    placed = Rows(documents + 1, front(index - start, 1))
    place = jnp.maximum(jnp.cumsum(chosen_BMT, axis=2) - 1, 0)
    return Packed(order, place, valid, placed, (last == document[..., -1:])[..., 0], last_at, seen)
