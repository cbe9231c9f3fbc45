"""What mixers with a recurrence of their own have in common: a cache, and scans by pieces.

Shape legend: B batch, T time, D model width.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import rows
from hybridlm.context import Context
from hybridlm.layers import RecurrentCache, ShortConv
from hybridlm.mixers import TokenMixer

PIECE = 128  # tokens whose states exist at a time


class RecurrentMixer(TokenMixer):
    """A kind defines `mixed`, ``state_shape`` (of one sequence) and, if it has any, its ``convs``."""

    state_shape: tuple[int, ...]

    @property
    def convs(self) -> tuple[ShortConv, ...]:
        return ()

    @abc.abstractmethod
    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        """(y [B, T, D], the cache after the last token); fresh: nothing came before, nor comes after."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        before = self.init_cache(len(x_BTD), 0, x_BTD.dtype) if cache is None else cache
        y_BTD, after = self.mixed(x_BTD, context, before, fresh=cache is None)
        return y_BTD, None if cache is None else after

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        state = jnp.zeros((batch, *self.state_shape), jnp.float32)
        return RecurrentCache(state, tuple(conv.init_history(batch, dtype) for conv in self.convs))


def cut(tree: Any) -> Any:
    """Arrays [B, T, ...] as [pieces, B, size, ...]; beyond the end floats are 0, and integers go on."""

    def one(a: jax.Array) -> jax.Array:
        mode = "constant" if jnp.issubdtype(a.dtype, jnp.floating) else "edge"
        return rows.cut(a, min(a.shape[1], PIECE), mode=mode)

    return jax.tree.map(one, tree)
