"""Token mixers, one file a kind: `hybridlm/mixers/<kind>.py` defines Config, Mixer and cost. Adding a file adds a kind."""

import importlib
import pkgutil
from types import ModuleType
from typing import NamedTuple

from hybridlm.errors import ConfigError, nearest


class Cost(NamedTuple):
    """What one layer of a mixer needs beyond its parameters (whose forward FLOPs are 2 a parameter and token).

    state: elements of fixed-size decode state per sequence, short-conv history included.
    cache_per_token: KV-cache elements per token of context.
    window: tokens of context that the cache keeps; 0 is all of them.
    flops: forward FLOPs per token of the fixed-size part (recurrence, short conv).
    flops_per_context: forward FLOPs per token and per token of visible context (softmax attention).
    """

    state: int = 0
    cache_per_token: int = 0
    window: int = 0
    flops: int = 0
    flops_per_context: int = 0


def kinds() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(kind: str) -> ModuleType:
    """The module of ``kind``; ConfigError for a kind that has no file."""
    if kind not in kinds():
        raise ConfigError("kind", kind, "must be one of " + ", ".join(kinds()), nearest(kind, kinds()))
    return importlib.import_module(f"hybridlm.mixers.{kind}")
