"""OLMo hybrid: pre-norm Gated DeltaNet blocks, post-norm attention blocks with q/k norms over all heads.

Source: transformers 5.23, models/olmo_hybrid.
"""

from typing import Any

from hybridlm.convert.family import Architecture, Family, assemble, describe, every_type, kinds, num_layers
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

NORMS = {
    "full_attention": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "linear_attention": ("attention_layer_norm", "feedforward_layer_norm"),
}


def read(fields: Fields) -> Architecture:
    layers = num_layers(fields)
    types = fields.layers("layer_types", kinds("olmo_hybrid"), layers)
    if types is None:
        types = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(layers)]
        types[-1] = types[-1] if "full_attention" in types else "full_attention"
    return assemble(fields, "olmo_hybrid", types, [False] * layers, post_norm=("full",))


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    every_type(definition, "olmo_hybrid")
    return describe(definition, FAMILY, model_type)


def rename(name: str) -> str:
    """Names at run time, and that under which transformers 5.23 saves the attention blocks' first norm."""
    renamed = name.replace(".input_layernorm.", ".attention_layer_norm.")
    if ".feedforward_layer_norm." in name:
        return name.replace(".feedforward_layer_norm.", ".post_attention_layernorm.")
    return renamed.replace(".post_attention_layernorm.", ".feedforward_layer_norm.")


FAMILY = Family("olmo_hybrid", {"olmo_hybrid": "OlmoHybrid"}, read, write, norms_of=NORMS, rename=rename)
