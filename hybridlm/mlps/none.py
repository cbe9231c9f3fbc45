"""No MLP: the block is its mixer alone, with one norm (Mamba)."""

import dataclasses

from hybridlm import mlps


@dataclasses.dataclass(frozen=True)
class Config(mlps.Config):
    """A block without an MLP."""


class Mlp(mlps.Mlp):
    config_class = Config
