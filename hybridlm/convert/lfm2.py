"""LFM2: gated short convolutions and attention with q/k norms, a SwiGLU after each.

Source: transformers 5.24, models/lfm2.
"""

from typing import Any

from hybridlm import mlps
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

FORMAT, FULL = "lfm2", "full_attention"
# Of Liquid AI's own code; transformers reads none of them.
IDLE = (
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta",
    "use_pos_enc",
)  # fmt: skip


def read(fields: Fields) -> Architecture:
    layers, d_model, eps = family.num_layers(fields), fields.size("hidden_size"), fields.get("norm_eps", 1e-5)
    known = family.kinds(FORMAT)
    full = fields.indices("full_attn_idxs", 0, layers - 1)
    named = fields.layers("layer_types", known, layers) or [
        FULL if full is None or index in full else "conv" for index in range(layers)
    ]
    fields.ignore(*IDLE)
    found = family.definitions(fields, FORMAT, d_model, eps)
    hidden = mlps.load("swiglu").public[FORMAT].read(fields, d_model, eps)["hidden"]
    model = family.settings(fields, d_model, eps, tied=True, mlp_hidden=hidden)
    model["tie_embeddings"] = fields.get("tie_embedding", model["tie_embeddings"])
    return Architecture([family.SHORT[known[one][0]] for one in named], found, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.every_type(definition, FORMAT)
    return family.outline(definition, FAMILY, model_type, layer_types=family.types(definition, FORMAT))


FAMILY = Family(
    FORMAT, {"lfm2": "Lfm2"}, read, write, norms=("operator_norm", "ffn_norm"), final_norm="embedding_norm"
)
