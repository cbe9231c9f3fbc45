"""LFM2: gated short convolutions and attention with q/k norms, a SwiGLU after each.

Source: transformers 5.24, models/lfm2.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm import mlps
from hybridlm.convert.family import SHORT, Architecture, Family, every_type, kinds, num_layers, said, types
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
    layers, d_model, eps = num_layers(fields), fields.size("hidden_size"), fields.get("norm_eps", 1e-5)
    known = kinds(FORMAT)
    full = fields.indices("full_attn_idxs", 0, layers - 1)
    named = fields.layers("layer_types", known, layers) or [
        FULL if full is None or index in full else "conv" for index in range(layers)
    ]
    fields.ignore(*IDLE)
    definitions = {
        SHORT[kind]: configs.mixer(kind, **one.read(fields, d_model, eps)) for kind, one in known.values()
    }
    model = {
        "d_model": d_model,
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": mlps.load("swiglu").public[FORMAT].read(fields, d_model, eps)["hidden"],
        "norm_eps": eps,
        "tie_embeddings": fields.get("tie_embedding", fields.get("tie_word_embeddings", True)),
    }
    fields.finish()
    return Architecture([SHORT[known[one][0]] for one in named], definitions, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    every_type(definition, FORMAT)
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": model_type,
        "hidden_size": definition.d_model,
        "layer_types": types(definition, FORMAT),
        "norm_eps": definition.model.norm_eps,
        "num_hidden_layers": len(definition.layers),
        "tie_word_embeddings": definition.model.tie_embeddings,
        "vocab_size": definition.vocab_size,
    } | said(definition.layers, FORMAT, definition.d_model)


FAMILY = Family(
    FORMAT,
    {"lfm2": "Lfm2"},
    read,
    write,
    norms=lambda layer_type: ("operator_norm", "ffn_norm"),
    final_norm="embedding_norm",
)
