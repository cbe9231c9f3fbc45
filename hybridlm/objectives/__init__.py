"""What a step minimises, one file a kind: `hybridlm/objectives/<kind>.py` has an Objective and its Config.

Adding a file adds a kind; "module:Class" names one that lives elsewhere.
"""

import abc
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from hybridlm import kinds as _kinds

if TYPE_CHECKING:
    from hybridlm.model import Definition, Params

TEACHER = "teacher."  # before the names of a teacher's parameters among the frozen ones
Sums = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config(_kinds.Settings):
    """A kind adds its fields, each with a default."""

    def check(self) -> None:
        """ConfigError, with a field relative to the section, for settings that do not fit together."""


class Objective:
    """Objective(config, definition, token_bytes); hashable state only, since it is traced.

    token_bytes: [V] bytes of text that each token stands for, or None.
    """

    config_class: ClassVar[type[Config]]
    teacher: "Definition | None" = None  # of another model, whose parameters are found in ``frozen``
    terms: ClassVar[tuple[str, ...]] = ()  # how its own sums "<term>..._loss_sum" begin: others are layers'

    def __init__(self, config: Config, definition: "Definition", token_bytes: jax.Array | None = None):
        self.config, self.definition, self.token_bytes = config, definition, token_bytes

    @abc.abstractmethod
    def loss(
        self, params: "Params", frozen: "Params", batch: Batch, wanted: tuple[str, ...] = ()
    ) -> tuple[jax.Array, Sums]:
        """(sum to differentiate in ``params``, sums).

        Sums over the tokens of the batch and not means, so that microbatches and hosts add up exactly; at
        least "loss_sum" and "tokens", by which the gradient is divided; "correct" where tokens are predicted.
        params: those that are trained.  frozen: the others, and under `TEACHER` those of ``self.teacher``;
            nothing is differentiated in them.
        batch: tokens, targets (negative: no loss), segment_ids, positions, int32 [B, T].
        wanted: records of layers to be returned as sums["records"], canonical name -> array.
        """
        raise NotImplementedError

    def evaluate(self, params: "Params", frozen: "Params", batch: Batch) -> Sums:
        """What a validation measures: sums as of `loss`, with "correct"."""
        return self.loss(params, frozen, batch)[1]


def load(kind: str) -> Any:
    """The Objective of ``kind``; ConfigError for a kind that there is not."""
    return _kinds.load(sys.modules[__name__], kind, "Objective")


def config_class(kind: str) -> type[Config]:
    return load(kind).config_class


def build(config: Config, definition: "Definition", token_bytes: jax.Array | None = None) -> Objective:
    return load(config.kind)(config, definition, token_bytes)
