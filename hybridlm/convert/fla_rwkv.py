"""flash-linear-attention's RWKV models: rwkv6, rwkv7.

LayerNorms with biases, one of the embedding, and channel mixing for an MLP. RWKV-7's first layer has nothing
to mix its values with, and no tensors for it. Source: fla 0.6.0, fla/models/rwkv6, fla/models/rwkv7.
"""

import dataclasses
from typing import Any

import numpy as np

from hybridlm import config as configs
from hybridlm import model
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule
from hybridlm.errors import ConfigError
from hybridlm.mlps import channel_mix
from hybridlm.model import Definition

FORMAT, MLP = "fla_rwkv", "channel_mix"
KINDS = family.kinds(FORMAT)
SAID: dict[str, Any] = {"hidden_act": "sqrelu", "norm_bias": True, "attn": None}


def read(fields: Fields) -> Architecture:
    kind, own = KINDS[fields.values["model_type"]]
    layers, d_model, eps = family.num_layers(fields), fields.size("hidden_size"), fields.get("norm_eps", 1e-5)
    for name, value in SAID.items():
        fields.only(name, value)
    definitions = family.define(family.SHORT[kind], kind, own.read(fields, d_model, eps))
    mlp = {MLP: configs.mlp(MLP, **channel_mix.Mlp.public[FORMAT].read(fields, d_model, eps))}
    first = fields.get("norm_first", True)
    around = family.settings(fields, d_model, eps, norm="layer", embedding_norm=first)
    return Architecture([f"{family.SHORT[kind]}/{MLP}"] * layers, definitions, mlp, around)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.alone(definition, FORMAT, model_type)
    for spec in definition.layers:
        if spec.mlp_kind != MLP:
            raise ConfigError("mlps", spec.name, f"has MLPs of kind {MLP}, not {spec.mlp_kind}")
    first = definition.model.embedding_norm
    return family.outline(definition, FAMILY, model_type, norm_first=first, **SAID)


class Rwkv(Family):
    def rules(self, definition: Definition) -> list[Rule]:
        shapes = model.canonical_shapes(definition)

        def known(rule: Rule) -> Rule:
            """Without tensors, where there are none: zeros here, which compute nothing."""
            if not rule.theirs[0].startswith("model.layers.0.attn.v_lora."):
                return rule
            blank = [np.zeros(shapes[name].shape, np.float32) for name in rule.ours]
            return dataclasses.replace(rule, theirs=(), inward=lambda _: blank, outward=lambda _: [])

        return [known(rule) for rule in super().rules(definition)]


FAMILY = Rwkv(
    FORMAT, {model_type: own.architecture for model_type, (_, own) in KINDS.items()}, read, write,
    norms=("attn_norm", "ffn_norm"), embedding="model.embeddings.weight", embedding_norm="layers.0.pre_norm",
)  # fmt: skip
