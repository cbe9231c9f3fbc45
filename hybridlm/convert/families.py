"""The families of public checkpoints, and which of them says a model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm import config as configs
from hybridlm import model, untrusted
from hybridlm.convert import (
    bailing_hybrid,
    deepseek_v3,
    falcon_h1,
    fla,
    fla_backbone,
    fla_rwkv,
    kimi_linear,
    lfm2,
    mamba,
    mamba_hybrids,
    minimax,
    nemotron_h,
    olmo_hybrid,
    qwen3,
    qwen3_next,
    recurrent_gemma,
    xlstm,
    zamba2,
)
from hybridlm.convert.family import Family, Unsayable, same_model
from hybridlm.convert.rules import Rule
from hybridlm.errors import ConfigError, nearest, one_of

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        fla.FAMILY, fla_backbone.FAMILY, fla_rwkv.FAMILY, qwen3.FAMILY, *qwen3_next.FAMILIES.values(),
        kimi_linear.FAMILY, olmo_hybrid.FAMILY, *mamba.FAMILIES.values(), *mamba_hybrids.FAMILIES,
        deepseek_v3.FAMILY, bailing_hybrid.FAMILY, falcon_h1.FAMILY, lfm2.FAMILY, minimax.FAMILY,
        nemotron_h.FAMILY, recurrent_gemma.FAMILY, xlstm.FAMILY, zamba2.FAMILY,
    )
    for model_type in family.classes
}  # fmt: skip
MULTIMODAL = {outer: inner for one in FAMILIES.values() for outer, inner in one.multimodal.items()}
CONFIG = "config.json"


class Source(NamedTuple):
    """A Hugging Face folder, read as far as its config.json. values: that, or its text_config."""

    directory: Path
    values: dict[str, Any]
    model_type: str
    family: Family
    config: configs.Config


def read_config(directory: str | Path) -> Source:
    """ConfigError when config.json is missing, of no known model_type or asks for something not supported."""
    file = Path(directory) / CONFIG
    if not file.is_file():
        fix = "Name a local folder; a model of the Hub is to be downloaded first."
        raise ConfigError("--hf", str(directory), f"holds no {CONFIG}", fix)
    values = untrusted.read_json(untrusted.inside(directory, CONFIG, "--hf"), "--hf", {"model_type": str})
    model_type = values["model_type"]
    if model_type in MULTIMODAL:
        values, model_type = _text(values, file), MULTIMODAL[model_type]
    one_of(f"{CONFIG}: model_type", model_type, sorted(FAMILIES))
    family = FAMILIES[model_type]
    return Source(Path(directory), values, model_type, family, family.architecture(values).config())


def _text(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config of a multimodal model's language model."""
    inner, expected = values.get("text_config"), MULTIMODAL[values["model_type"]]
    if not isinstance(inner, dict) or inner.get("model_type", expected) != expected:
        raise ConfigError(f"{CONFIG}: text_config", str(file), f"must be a mapping of model_type {expected}")
    tied = values.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))
    names = values.get("architectures") or ["ForConditionalGeneration"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{CONFIG}: architectures", names, "must list names")
    causal = [one.replace("ForConditionalGeneration", "ForCausalLM") for one in names]
    return inner | {"model_type": expected, "tie_word_embeddings": tied, "architectures": causal}


class Plan(NamedTuple):
    """How a model's parameters and a checkpoint's tensors correspond.

    shapes: of every tensor, as the rules have it.
    """

    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]


def plan(definition: model.Definition, family: Family, values: Mapping[str, Any]) -> Plan:
    """values: config.json."""
    ours = model.canonical_shapes(definition)
    rules = family.rules(definition) + family.derived(definition, values)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        theirs = rule.their_shapes([ours[name].shape for name in rule.ours])
        shapes |= dict(zip(rule.theirs, theirs, strict=True))
    named = {name for rule in rules for name in rule.ours}
    if named != set(ours):  # every parameter has a rule, or the rules are wrong
        raise RuntimeError(f"rules of {family.format}: {sorted(named ^ set(ours))}")
    return Plan(rules, shapes)


@functools.lru_cache(maxsize=16)
def public_format(config: configs.Config) -> tuple[str, str]:
    """(model_type of the public format that says this model, ""), or ("", in words why there is none).

    For a training run to say at its start what `export` would say at its end. Nothing is compiled.
    """
    try:
        return written(model.build(config))[0], ""
    except ConfigError as error:
        return "", error.allowed


def written(definition: model.Definition, model_type: str = "") -> tuple[str, dict[str, Any]]:
    """(model_type, config.json) of the first family that says this model and reads back as it."""
    reasons, unknown = [], []
    for name in [model_type] if model_type else FAMILIES:
        if name not in FAMILIES:
            raise ConfigError("--model_type", name, "is no known family", nearest(name, FAMILIES))
        try:
            FAMILIES[name].check(definition)
            values = FAMILIES[name].write(definition, name)
            config = FAMILIES[name].architecture(values).config()
        except Unsayable as error:
            unknown.append(f"{name} ({error.allowed})")
            continue
        except ConfigError as error:
            whose = f"{error.field} " if error.allowed.startswith(("must", "is not supported")) else ""
            reasons.append(f"{name} ({whose}{error.allowed})")
            continue
        difference = same_model(model.build(config), definition)
        if not difference:
            return name, values
        reasons.append(f"{name} ({difference})")
    problem = f"is none that a public format can say: {'; '.join(reasons or unknown)}"
    if not reasons and not model_type:
        layers = definition.layers
        kinds = ", ".join(dict.fromkeys([one.kind for one in layers] + [one.mlp_kind for one in layers]))
        problem = f"is none that a public format can say: none has layers of exactly these kinds: {kinds}"
    raise ConfigError("model.pattern", definition.model.pattern, problem)
