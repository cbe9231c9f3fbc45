"""What a family of public checkpoints is to the converter."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import model, plan
from hybridlm.block import Spec
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule
from hybridlm.errors import ConfigError

TRAINING = ("balance_loss", "bias_rate")  # settings of layers that do not change what they compute


class Architecture(NamedTuple):
    """What a config.json says, in the terms of a config here. layers: an item of the pattern for each."""

    layers: list[str]
    mixers: dict[str, ConfigDict]
    mlps: dict[str, ConfigDict]
    model: dict[str, Any]

    def config(self) -> configs.Config:
        """A resolved config, with the defaults of everything that a checkpoint does not say."""
        config = configs.default()
        config.model.update(self.model, pattern=str(plan.plan(self.layers)))
        config.mixers, config.mlps = ConfigDict(self.mixers), ConfigDict(self.mlps)
        config.data = configs.data("text", path="python-stdlib:")
        return configs.resolve(config)


@dataclasses.dataclass(frozen=True)
class Family:
    """read: config.json -> Architecture; write: Definition and model_type -> config.json, ConfigError where
        there is none. What cannot be said may be left out: the caller reads it back and compares.
    rules: every tensor.  rename: another name that a tensor has in circulation -> its name in the rules.
    unused: prefixes of tensors that the language model's forward pass has no use for.
    multimodal: model_type of a model around one of these -> model_type of its text_config.
    """

    model_types: tuple[str, ...]
    read: Callable[[Fields], Architecture]
    write: Callable[[model.Definition, str], dict[str, Any]]
    rules: Callable[[model.Definition, str], list[Rule]]
    rename: Callable[[str], str] = lambda name: name
    unused: tuple[str, ...] = ()
    multimodal: Mapping[str, str] = dataclasses.field(default_factory=dict)


def same_model(a: model.Definition, b: model.Definition) -> str:
    """What two definitions compute differently, in words; "" if nothing."""
    for field in ("d_model", "vocab_size", "norm_eps", "norm_unit_offset", "tie_embeddings"):
        ours, theirs = getattr(a.model, field), getattr(b.model, field)
        if ours != theirs:
            return f"model.{field} {ours} and {theirs}"
    if len(a.layers) != len(b.layers):
        return f"{len(a.layers)} and {len(b.layers)} layers"
    for index, (one, other) in enumerate(zip(a.layers, b.layers, strict=True)):
        for what in ("kind", "mlp_kind", "post_norm"):
            if getattr(one, what) != getattr(other, what):
                return f"layer {index}: {what} {getattr(one, what)} and {getattr(other, what)}"
        for x, y in (
            (one.config.explicit(a.d_model), other.config.explicit(b.d_model)),
            (one.mlp_config, other.mlp_config),
        ):
            for name, value in vars(x).items():
                if value != getattr(y, name) and name not in TRAINING:
                    return f"layer {index}: {name} {value} and {getattr(y, name)}"
    return ""


def of_kind(definition: model.Definition, kind: str) -> list[Spec]:
    """The layers of a kind of mixer."""
    return [spec for spec in definition.layers if spec.kind == kind]


def uniform(specs: list[Spec], what: str, d_model: int) -> Any:
    """The settings that all of ``specs`` share; ConfigError when they differ."""
    settings = {spec.config.explicit(d_model) for spec in specs}
    if len(settings) != 1:
        raise ConfigError("model.pattern", what, "must have the same settings in every layer to be exported")
    return settings.pop()


def mlp_widths(definition: model.Definition) -> int:
    """The width of the stack's SwiGLUs, 0 without one; ConfigError when they differ."""
    widths = {spec.mlp_config.hidden for spec in definition.layers if spec.mlp_kind == "swiglu"}
    if len(widths) > 1:
        raise ConfigError("mlps", sorted(widths), "must be one width of SwiGLU to be exported")
    return widths.pop() if widths else 0
