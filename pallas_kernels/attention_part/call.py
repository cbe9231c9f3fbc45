"""One part of softmax attention: what every backend receives.

Shape legend: B batch, T queries, S keys, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNSEEN = -1e30  # the log of a sum of no terms; finite, so that differences are


class Merged(NamedTuple):
    """Of the whole attention that a part belongs to. do, o: [B, T, H, V].  log_sum: float32 [B, H, T]."""

    do: jax.Array
    o: jax.Array
    log_sum: jax.Array


@dataclasses.dataclass(frozen=True)
class PartCall:
    """q: [B, T, H, K].  k: [B, S, G, K].  v: [B, S, G, V].  Floating, of one dtype.

    queries: int32 [B], the first so many see anything.
    keys: None, and query t sees the keys s <= t (T = S); or int32 [B]: all of the last so many.
    leading: of the first so many instead.
    merged: None, or what the gradients are of.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: jax.Array
    keys: jax.Array | None
    scale: float
    merged: Merged | None = None
    leading: bool = False

    def real(self) -> jax.Array:
        """Which queries see anything: bool [B, T]."""
        seeing = self.queries if self.keys is None else jnp.where(self.keys > 0, self.queries, 0)
        return jnp.arange(self.q.shape[1]) < seeing[:, None]

    def seen(self) -> jax.Array:
        """Which keys each query sees: bool [B, T, S]."""
        index_T, index_S = (jnp.arange(x.shape[1]) for x in (self.q, self.k))
        if self.keys is None:
            return self.real()[..., None] & (index_S <= index_T[:, None])
        return self.real()[..., None] & self.among(self.keys[:, None, None])

    def among(self, keys: jax.Array) -> jax.Array:
        """Which keys are among the ``keys`` that are seen: bool [..., S]."""
        index_S = jnp.arange(self.k.shape[1])
        return index_S < keys if self.leading else index_S >= len(index_S) - keys
