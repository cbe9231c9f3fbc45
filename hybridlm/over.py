"""Kinds that are made over another one: its projections and gates, and more states than one.

A definition names another of `mixers` (``of``), as `parallel` names its branches. That must be a kind whose
recurrence is the op of `linear_mixer.recurrence` as it is, one write a token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from hybridlm import mixers
from hybridlm.errors import ConfigError, nearest
from hybridlm.linear_mixer import LinearMixer


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """of: the name in `mixers` of what it is made over."""

    part: ClassVar[Any] = None  # the settings that ``of`` names; a field of what `joined` returns

    of: str = "gdn"

    def needs(self) -> tuple[str, ...]:
        return (self.of,)

    def joined(self, known: Mapping[str, mixers.Config]) -> Any:
        if self.of not in known:
            raise ConfigError("of", self.of, f"no mixer named {self.of!r} in mixers", nearest(self.of, known))
        part = known[self.of]
        kind = mixers.load(part.kind)
        plain = issubclass(kind, LinearMixer) and kind.recur is LinearMixer.recur
        if part.needs() or kind.shared_class or not plain:
            problem = f"{self.of}, of kind {part.kind}, has no single matrix that a token writes to once"
            fix = "Such as mamba2, gdn, kda, deltanet, gla, retnet, lightning and comba have."
            raise ConfigError("of", self.of, problem, fix)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _with_part(type(self))(**values, part=part)

    def matrix(self, d_model: int) -> int:
        """Elements of one state of ``part``."""
        heads = self.part.heads(d_model)
        return heads.num_v * heads.key * heads.value


@functools.cache
def _with_part(config: type[Config]) -> Any:
    def explicit(self: Any, d_model: int) -> Any:
        return dataclasses.replace(self, part=self.part.explicit(d_model))

    fields = [("part", mixers.Config, dataclasses.field(default=None, kw_only=True))]
    names = {"explicit": explicit, "__module__": config.__module__}
    return dataclasses.make_dataclass("Joined", fields, bases=(config,), namespace=names, frozen=True)
