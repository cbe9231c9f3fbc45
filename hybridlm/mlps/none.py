"""No MLP: the block is its mixer alone, with one norm (Mamba)."""

import dataclasses
from typing import ClassVar

from hybridlm import mlps
from hybridlm.convert.public import Format


@dataclasses.dataclass(frozen=True)
class Config(mlps.Config):
    """A block without an MLP."""


NOTHING: Format[Config] = Format(lambda *_: {}, lambda *_: {}, lambda *_: [], "")


FORMATS = "fla_backbone", "mamba", "falcon_mamba", "nemotron_h", "zamba2"


class Mlp(mlps.Mlp):
    config_class = Config
    public: ClassVar = dict.fromkeys(FORMATS, NOTHING)
