"""What follows the mixer in a block, one file a kind: `hybridlm/mlps/<kind>.py` has a Config and an Mlp.

Adding a file adds a kind; "module:Class" names one that lives elsewhere. Kind "none" is a block without.
"""

import abc
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from hybridlm import kinds as _kinds
from hybridlm.context import Context
from hybridlm.convert.public import Format
from hybridlm.fields import Count

DEFAULT = "swiglu"  # of a layer that names none


@dataclasses.dataclass(frozen=True)
class Config(_kinds.Settings):
    """What the settings of every kind can be asked; a kind adds its fields, each with a default."""

    def check(self, d_model: int) -> None:
        """ConfigError, with a field relative to the definition, for settings that do not fit together."""

    def filled(self, model_hidden: int) -> Any:
        """The settings with those that follow from model.mlp_hidden put in."""
        return self

    def idle(self, d_model: int) -> int:
        """Parameters of one layer that a given token does not touch."""
        return 0

    def state(self, d_model: int) -> int:
        """Elements of decode state of one layer, of MLPs that keep any."""
        return 0

    def explicit(self) -> Any:
        """The same settings to be compared: those that change no output are what they are by default."""
        return self


@dataclasses.dataclass(frozen=True)
class Inner(Config):
    """hidden: width between the projections; 0 is model.mlp_hidden."""

    hidden: Count = 0

    def filled(self, model_hidden: int) -> Any:
        return dataclasses.replace(self, hidden=self.hidden or model_hidden)


class Mlp(nnx.Module):
    """Mlp(config, site, rngs=rngs): x [..., D] -> y [..., D]; a decode step has no T axis.

    public: how checkpoints of each public format that has this kind say it.
    keeps: whether y depends on tokens before, too. It is then (x [B, T, D], context, cache) -> (y, cache),
        with an `init_cache` and a `step`, as a mixer is.
    """

    config_class: ClassVar[type[Config]]
    keeps: ClassVar[bool] = False
    public: ClassVar[Mapping[str, Format[Any]]] = {}

    @abc.abstractmethod
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        raise NotImplementedError

    def init_cache(self, batch: int, dtype: Any) -> Any:
        """Of one that keeps anything: an empty cache for ``batch`` rows."""
        raise NotImplementedError

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """Of one that keeps anything: one more token a row."""
        raise NotImplementedError


def load(kind: str) -> Any:
    """The Mlp of ``kind``; ConfigError for a kind that there is not."""
    return _kinds.load(sys.modules[__name__], kind, "Mlp")


def config_class(kind: str) -> type[Config]:
    return load(kind).config_class
