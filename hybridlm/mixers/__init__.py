"""Token mixers, one file a kind: `hybridlm/mixers/<kind>.py` defines Config, Mixer and cost.

Adding a file adds a kind.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
from flax import nnx

from hybridlm.errors import ConfigError, nearest
from hybridlm.rows import Rows


class Cost(NamedTuple):
    """What one layer of a mixer needs beyond its parameters (which cost 2 forward FLOPs each and token).

    state: elements of fixed-size decode state per sequence, short-conv history included.
    cache_per_token: KV-cache elements per token of context.
    window: tokens of context that the cache keeps; 0 is all of them.
    flops: forward FLOPs per token of the recurrence.
    flops_per_context: forward FLOPs per token and per token of visible context (softmax attention).
    """

    state: int = 0
    cache_per_token: int = 0
    window: int = 0
    flops: int = 0
    flops_per_context: int = 0


class TokenMixer(nnx.Module):
    """Every kind's Mixer: a map from [B, T, D] to [B, T, D] that may carry a cache from call to call."""

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Any:
        """An empty cache of fixed shapes for ``batch`` rows of at most ``max_length`` tokens."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, cache: Any = None, shared: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """(y [B, T, D], cache): with a cache the tokens are appended to it, without one None comes back.

        All rows of a batch are appended together, so prompts of several lengths are padded on the left.
        shared: this layer's row of the kind's `Shared` parameters, None for a kind without.
        """
        raise NotImplementedError

    def step(
        self, x_BD: jax.Array, rows: Rows, cache: Any, shared: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """One more token a row: ``rows`` and x without the T axis."""
        rows = Rows(rows.segment_ids[:, None], rows.positions[:, None])
        y_BTD, cache = self(x_BD[:, None], rows, cache, shared)
        return y_BTD[:, 0], cache


def kinds() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(kind: str) -> ModuleType:
    """The module of ``kind``; ConfigError for a kind that has no file."""
    if kind not in kinds():
        raise ConfigError("kind", kind, "must be one of " + ", ".join(kinds()), nearest(kind, kinds()))
    return importlib.import_module(f"hybridlm.mixers.{kind}")


# Checks that the kinds' `Config.check` share.


def at_least(config: Any, minimum: float, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < minimum:
            raise ConfigError(field, getattr(config, field), f"must be at least {minimum}")


def one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        raise ConfigError(field, value, "must be one of " + ", ".join(allowed), nearest(str(value), allowed))


def whole_heads(config: Any, width: int, head_dim: int) -> None:
    """``width`` must split into heads of ``head_dim`` where ``config.num_heads`` is 0."""
    if config.num_heads == 0 and (width < head_dim or width % head_dim):
        raise ConfigError(
            "num_heads",
            0,
            f"0 splits a width of {width} into heads of {head_dim}, which leaves a remainder",
            "Set num_heads, or a head_dim that divides the width.",
        )
