"""Qwen3, dense: softmax attention with q/k norms. Source: transformers 5.23, models/qwen3."""

from typing import Any

from ml_collections import ConfigDict

from hybridlm.convert.family import Architecture, Family, assemble, describe, num_layers, said
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

SLIDING = "sliding_attention"


def read(fields: Fields) -> Architecture:
    layers = num_layers(fields)
    sliding = fields.get("use_sliding_window", False) and fields.values.get("sliding_window", 0) is not None
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    types = fields.layers("layer_types", ("full_attention", SLIDING), layers) or [
        SLIDING if sliding and index >= first else "full_attention" for index in range(layers)
    ]
    if SLIDING in types and not sliding:
        raise fields.refuse("use_sliding_window", "must be true where layer_types has sliding_attention")
    found = assemble(fields, "qwen3", types, [False] * layers)
    windowed = ConfigDict(found.mixers["full"].to_dict() | {"window": window})
    names = ["swa" if name == SLIDING else name for name in found.layers]
    return found._replace(layers=names, mixers=found.mixers | {"swa": windowed})


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    windowed = ["sliding_window" in said([spec], "qwen3", definition.d_model) for spec in definition.layers]
    types = [SLIDING if one else "full_attention" for one in windowed]
    return describe(definition, FAMILY, model_type) | {"layer_types": types}


FAMILY = Family("qwen3", {"qwen3": "Qwen3"}, read, write)
