"""flash-linear-attention's models of the Mamba family that have MLPs: log_linear_mamba2.

Every layer is of one kind, and the MLP's width follows from d_model. Source: fla 0.6.0,
fla/models/log_linear_mamba2.
"""

from typing import Any

from hybridlm.convert.family import (
    SHORT,
    Architecture,
    Family,
    define,
    kinds,
    num_layers,
    said,
    types,
)
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

FORMAT = "fla_backbone"
KINDS = kinds(FORMAT)


def hidden(d_model: int) -> int:
    """fla's GatedMLP at a ratio of 4, which these configs cannot say otherwise."""
    return -(-int(d_model * 4 * 2 / 3) // 256) * 256


def read(fields: Fields) -> Architecture:
    kind, own = KINDS[fields.values["model_type"]]
    layers, d_model, eps = num_layers(fields), fields.size("hidden_size"), fields.get("norm_eps", 1e-5)
    fields.only("hidden_act", "silu", "swish")
    fields.only("attnres_block_size", None)
    definitions = define(SHORT[kind], kind, own.read(fields, d_model, eps))
    model = {
        "d_model": d_model,
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": hidden(d_model),
        "norm_eps": eps,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    fields.finish()
    return Architecture([SHORT[kind]] * layers, definitions, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    types(definition, FORMAT)  # refuses layers of other kinds
    fields = said(definition.layers, FORMAT, definition.d_model)
    del fields["intermediate_size"]
    return {
        "architectures": [f"{FAMILY.classes[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": definition.d_model,
        "hidden_act": "silu",
        "num_hidden_layers": len(definition.layers),
        "norm_eps": definition.model.norm_eps,
        "tie_word_embeddings": definition.model.tie_embeddings,
        "vocab_size": definition.vocab_size,
    } | fields


FAMILY = Family(
    FORMAT,
    {model_type: own.architecture for model_type, (_, own) in KINDS.items()},
    read,
    write,
    norms=lambda layer_type: ("mixer_norm", "mlp_norm"),
    embedding="backbone.embeddings.weight",
    body="backbone.",
    final_norm="norm_f",
    rename=lambda name: name.replace("backbone.embedding.", "backbone.embeddings."),
)
