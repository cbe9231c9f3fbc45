"""What a family of public checkpoints is to the converter: the model around its layers.

What the layers themselves are called stands with each kind (`hybridlm.convert.public`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import mixers, mlps, model, plan
from hybridlm.block import Spec
from hybridlm.convert.fields import MAX_LAYERS, Fields
from hybridlm.convert.public import EVERY, Format
from hybridlm.convert.rules import Rule, bias, norm, same, transposed
from hybridlm.errors import ConfigError

SHORT = {kind: name for name, (kind, settings) in configs.STANDARD.items() if not settings}
SPARSE, NO_MLP = "moe", "none"
FULL, LINEAR = "full_attention", "linear_attention"  # layer types of many formats
SETTINGS = (
    "d_model", "vocab_size", "norm", "embedding_norm", "norm_eps", "norm_unit_offset", "tie_embeddings",
    "embedding_multiplier", "residual_multiplier", "logit_divisor", "logit_cap", "mup_base_width",
)  # fmt: skip


class Unsayable(ConfigError):
    """A kind of layer that a format has not."""


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
    """format: of its layers, a key of a kind's ``public``.
    classes: model_type -> prefix of the classes' names.
    read: config.json -> Architecture.
    write: (Definition, model_type) -> config.json, ConfigError where there is none. What cannot be said may
        be left out: the caller reads it back and compares.
    norms: names of a layer's two norms; of a layer without an MLP the first counts.
    norms_of: layer type -> the same, of types that have others.
    embedding: its name.  body: prefix of the layers and of the norm after them, which is ``final_norm``.
    layers: what they are called.
    embedding_norm: of a family that has one.
    rename: another name that a tensor has in circulation -> its name in the rules.
    unused: config.json -> prefixes of tensors that the language model's forward pass has no use for.
    multimodal: model_type of a model around one of these -> model_type of its text_config.
    derived: (Definition, config.json) -> Rules of tensors that follow from these (`rules.derived`).
    """

    format: str
    classes: Mapping[str, str]
    read: Callable[[Fields], Architecture]
    write: Callable[[model.Definition, str], dict[str, Any]]
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_of: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    embedding: str = "model.embed_tokens.weight"
    body: str = "model."
    final_norm: str = "norm"
    layers: str = "layers"
    embedding_norm: str = ""
    rename: Callable[[str], str] = lambda name: name
    unused: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda values: ()
    multimodal: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: Callable[[model.Definition, Mapping[str, Any]], list[Rule]] = lambda definition, values: []

    def architecture(self, values: Mapping[str, Any]) -> Architecture:
        """What ``values``, a config.json, say; ConfigError for a field that `read` did not take."""
        fields = Fields(values)
        found = self.read(fields)
        fields.finish()
        return found

    def check(self, definition: model.Definition) -> None:
        """Unsayable for a kind of layer that the format has not: the first thing to be told."""
        for spec in dict.fromkeys(definition.layers):
            mixer_format(spec, self.format)
            mlp_format(spec, self.format)

    def rules(self, definition: model.Definition) -> list[Rule]:
        """Every tensor that holds parameters."""
        d_model, name = definition.d_model, self.format
        model = definition.model
        normed = lambda *names: [norm(*names)] + [bias(*names)] * (model.norm == "layer")
        found = [same("embedding", self.embedding), *normed("final_norm", self.body + self.final_norm)]
        if model.embedding_norm:
            found += normed("embedding_norm", self.body + self.embedding_norm)
        if not model.tie_embeddings:
            found.append(transposed("head", "lm_head.weight"))
        for mixer, spec in {spec.mixer: spec for spec in definition.layers}.items():
            shared = mixer_format(spec, name).shared(spec.config.explicit(d_model))
            found += [rule.under(f"shared.{mixer}.", self.body) for rule in shared]
        for index, spec in enumerate(definition.layers):
            mixer_, mlp = mixer_format(spec, name), mlp_format(spec, name)
            before, after = self.norms_of.get(mixer_.layer_type, self.norms)
            layer = [] if spec.config.norms_itself else normed("mixer_norm", before)
            layer += normed("mlp_norm", after) if spec.mlp_kind != NO_MLP else []
            layer += [rule.under("mixer.", mixer_.module) for rule in mixer_.rules(spec.config, d_model)]
            layer += [rule.under("mlp.", mlp.module) for rule in mlp.rules(spec.mlp_config, d_model)]
            found += [rule.under(f"layers.{index}.", f"{self.body}{self.layers}.{index}.") for rule in layer]
        return found


# Names of tensors where there is a backbone.
BACKBONE: dict[str, Any] = dict(
    embedding="backbone.embeddings.weight",
    body="backbone.",
    final_norm="norm_f",
    rename=lambda name: name.replace("backbone.embedding.", "backbone.embeddings."),
)


def kinds(format: str) -> dict[str, tuple[str, Format[Any]]]:
    """layer_type -> (kind, Format) of the mixers that a format has."""
    known = {kind: mixers.public(kind).get(format) for kind in mixers.kinds()}
    return {one.layer_type: (kind, one) for kind, one in known.items() if one}


def define(name: str, kind: str, settings: dict[str, Any]) -> dict[str, ConfigDict]:
    """The definition, and beside it that of what it is made over, which ``of`` says as (kind, settings)."""
    if "of" not in settings:
        return {name: configs.mixer(kind, **settings)}
    inner, values = settings["of"]
    return define(SHORT[inner], inner, values) | {
        name: configs.mixer(kind, **settings | {"of": SHORT[inner]})
    }


def mixer_format(spec: Spec, format: str) -> Format[Any]:
    found = mixers.public(spec.kind).get(format)
    if spec.reuses:
        raise Unsayable("model.pattern", spec.name, "has no layer that reuses another's keys and values")
    if found is None:
        raise Unsayable("model.pattern", spec.name, f"has no layer of kind {spec.kind}")
    return found


def mlp_format(spec: Spec, format: str) -> Format[Any]:
    public = mlps.load(spec.mlp_kind).public
    if format not in public and EVERY not in public:
        raise Unsayable("mlps", spec.name, f"has no layer with an MLP of kind {spec.mlp_kind}")
    return public.get(format) or public[EVERY]


def types(definition: model.Definition, format: str) -> list[str]:
    return [mixer_format(spec, format).layer_type for spec in definition.layers]


def alone(definition: model.Definition, format: str, model_type: str) -> None:
    """ConfigError unless every layer is of this type."""
    for spec, found in zip(definition.layers, types(definition, format), strict=True):
        if found != model_type:
            raise Unsayable("model.pattern", spec.name, f"has layers of {model_type} alone")


def sparse(definition: model.Definition) -> list[bool]:
    return [spec.mlp_kind == SPARSE for spec in definition.layers]


def said(specs: Iterable[Spec], format: str, d_model: int) -> dict[str, Any]:
    """Fields of config.json that say the mixers and MLPs; ConfigError where two layers contradict."""
    values: dict[str, Any] = {}
    for spec in dict.fromkeys(specs):
        mixer, mlp = mixer_format(spec, format), mlp_format(spec, format)
        fields = mixer.write(spec.config.explicit(d_model), d_model) | mlp.write(spec.mlp_config, d_model)
        for name, value in fields.items():
            if values.setdefault(name, value) != value:
                problem = f"has one {name} for all layers, not {values[name]} and {value}"
                raise ConfigError("model.pattern", spec.name, problem)
    return values


# config.json of transformers' families, which have names of layers in layer_types.


def assemble(
    fields: Fields,
    format: str,
    types: list[str],
    sparse: list[bool],
    eps: float = 1e-6,
    hidden: str = "intermediate_size",
    **model: Any,
) -> Architecture:
    """What remains to be read once it is known of which type each layer is, and whether it has experts.

    eps: what a missing rms_norm_eps stands for.  hidden: the field of a dense MLP's width.
    model: settings besides.
    """
    fields.only("hidden_act", "silu")
    d_model, eps = fields.size("hidden_size"), fields.get("rms_norm_eps", eps)
    known, found = kinds(format), definitions(fields, format, d_model, eps)
    experts = mlps.load(SPARSE).public.get(format)
    mlp = {SPARSE: configs.mlp(SPARSE, **experts.read(fields, d_model, eps))} if experts else {}
    model["mlp_hidden"] = fields.size(hidden, default=d_model if all(sparse) else None)
    names = [SHORT[known[one][0]] if one in known else one for one in types]
    layers = [f"{name}/{SPARSE}" if has else name for name, has in zip(names, sparse, strict=True)]
    return Architecture(layers, found, mlp, settings(fields, d_model, eps, **model))


def describe(definition: model.Definition, family: Family, model_type: str) -> dict[str, Any]:
    """The inverse of `assemble`, with layer_types."""
    return outline(
        definition, family, model_type, "rms_norm_eps",
        hidden_act="silu", layer_types=types(definition, family.format),
        intermediate_size=definition.d_model,  # of a model without dense layers
    )  # fmt: skip


def num_layers(fields: Fields) -> int:
    return fields.size("num_hidden_layers", MAX_LAYERS)


PREDICTING = "num_nextn_predict_layers", "num_mtp_layers"


def predicting(values: Mapping[str, Any], default: int = 0) -> tuple[str, ...]:
    """Prefixes of layers that predict further tokens, which stand after the others and are in no pass."""
    count = Fields(values).either(*PREDICTING, default, MAX_LAYERS)
    first = values["num_hidden_layers"]
    return tuple(f"model.layers.{index}." for index in range(first, first + count))


def first_dense(fields: Fields, layers: int, default: int) -> list[bool]:
    """Of each layer, whether it has experts, in either way of saying it; default: layers that have none."""
    dense = fields.get("first_k_dense_replace", default)
    named = fields.layers("mlp_layer_types", ("dense", "sparse"), layers)
    return [one == "sparse" for one in named] if named else [index >= dense for index in range(layers)]


def first_dense_fields(definition: model.Definition) -> dict[str, Any]:
    experts = sparse(definition)
    return {
        "mlp_layer_types": ["sparse" if one else "dense" for one in experts],
        "first_k_dense_replace": [*experts, True].index(True),
    }


def untied(definition: model.Definition) -> None:
    """ConfigError where the head is the embedding: transformers would start one of its own, at random."""
    if definition.model.tie_embeddings:
        fix = "Train with model.tie_embeddings=False."
        raise ConfigError("model.tie_embeddings", True, "this format has a head of its own", fix)


def definitions(fields: Fields, format: str, d_model: int, eps: float) -> dict[str, ConfigDict]:
    """The mixers of a format of which a model may have all."""
    every = kinds(format).values()
    return {SHORT[kind]: configs.mixer(kind, **one.read(fields, d_model, eps)) for kind, one in every}


def settings(fields: Fields, d_model: int, eps: float, tied: bool = False, **others: Any) -> dict[str, Any]:
    """Of the model around its layers, and ``others``.  tied: what a missing tie_word_embeddings says."""
    tied = fields.get("tie_word_embeddings", tied)
    vocab_size = fields.size("vocab_size")
    return {"d_model": d_model, "vocab_size": vocab_size, "norm_eps": eps, "tie_embeddings": tied} | others


def outline(
    definition: model.Definition, family: Family, model_type: str,
    eps: str = "norm_eps", specs: Iterable[Spec] | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """config.json, ``others`` in it.

    eps: the field of the norms'.  specs: the layers that it says, not all.
    """
    return {
        "architectures": [f"{family.classes[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": definition.d_model,
        "num_hidden_layers": len(definition.layers),
        eps: definition.model.norm_eps,
        "tie_word_embeddings": definition.model.tie_embeddings,
        "vocab_size": definition.vocab_size,
        **others,
        **said(definition.layers if specs is None else specs, family.format, definition.d_model),
    }


def every_type(definition: model.Definition, format: str) -> None:
    """ConfigError unless each of the format's kinds of layers is there."""
    missing = sorted(set(kinds(format)) - set(types(definition, format)))
    if missing:
        raise Unsayable("model.pattern", definition.model.pattern, f"has layers of {', '.join(missing)}, too")


def same_model(a: model.Definition, b: model.Definition) -> str:
    """What ``b`` computes differently from ``a``, in words; "" if nothing.

    Settings are compared in their `explicit` form: of those that compute nothing no difference is seen.
    """
    for field in SETTINGS:
        ours, theirs = getattr(a.model, field), getattr(b.model, field)
        if ours != theirs:
            return f"model.{field} {theirs}, not {ours}"
    if len(a.layers) != len(b.layers):
        return f"{len(b.layers)} layers, not {len(a.layers)}"
    for index, (one, other) in enumerate(zip(a.layers, b.layers, strict=True)):
        for what in ("kind", "mlp_kind", "post_norm", "stream"):
            if getattr(one, what) != getattr(other, what):
                return f"layer {index}: {what} {getattr(other, what)}, not {getattr(one, what)}"
        if mixers.shares_module(one.kind):
            first = [[spec.mixer for spec in each.layers].index(each.layers[index].mixer) for each in (a, b)]
            if first[0] != first[1]:
                return f"layer {index}: the block of layer {first[1]}, not of layer {first[0]}"
        for x, y in (
            (settings_of(one.config.explicit(a.d_model)), settings_of(other.config.explicit(b.d_model))),
            (vars(one.mlp_config.explicit()), vars(other.mlp_config.explicit())),
        ):
            for name, value in x.items():
                if value != y.get(name):
                    return f"layer {index}: {name} {y.get(name)}, not {value}"
    return ""


def settings_of(explicit: Any) -> dict[str, Any]:
    """By name, those of what it is made over (`hybridlm.over`) among them."""
    values = dict(vars(explicit))
    part = values.pop("part", None)
    return values | ({} if part is None else {f"of.{name}": value for name, value in vars(part).items()})
