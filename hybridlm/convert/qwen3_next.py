"""Qwen3-Next and Qwen3.5's text models: Gated DeltaNet, gated attention, partial rotation, (1+w) norms.

Qwen3-Next has experts and fuses its projections by key head; Qwen3.5 keeps them apart and is dense or has
experts. Sources: transformers 5.23, models/qwen3_next, models/qwen3_5 and models/qwen3_5_moe.
"""

from typing import Any

from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family, Unsayable
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition


def read(fields: Fields) -> Architecture:
    this = FAMILIES[fields.values["model_type"]]
    layers, interval = family.num_layers(fields), fields.size("full_attention_interval", default=4)
    types = fields.layers("layer_types", family.kinds(this.format), layers) or [
        "linear_attention" if (index + 1) % interval else "full_attention" for index in range(layers)
    ]
    fields.only("attn_output_gate", True)
    fields.only("output_gate_type", "swish", "silu")
    fields.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    experts = [this.format == "qwen3_5_moe"] * layers
    if this.format == "qwen3_next":
        dense = fields.indices("mlp_only_layers", 0, layers - 1) or []
        step = fields.size("decoder_sparse_step", default=1)
        experts = [index not in dense and not (index + 1) % step for index in range(layers)]
    return family.assemble(fields, this.format, types, experts, norm_unit_offset=True)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    this, experts = FAMILIES[model_type], family.sparse(definition)
    family.every_type(definition, this.format)
    if this.format == "qwen3_next" and not any(experts):
        raise Unsayable("mlps", definition.model.pattern, "has layers with experts")
    values = family.describe(definition, this, model_type)
    if this.format == "qwen3_next":
        values["mlp_only_layers"] = [index for index, has in enumerate(experts) if not has]
    return values


def _family(format: str, model_type: str, prefix: str, **multimodal: str) -> Family:
    return Family(
        format, {model_type: prefix}, read, write,
        rename=lambda name: name.replace("model.language_model.", "model."),
        unused=lambda values: ("mtp.", "model.visual."), multimodal=multimodal,
    )  # fmt: skip


NEXT = _family("qwen3_next", "qwen3_next", "Qwen3Next")
DENSE = _family("qwen3_5", "qwen3_5_text", "Qwen3_5", qwen3_5="qwen3_5_text")
MOE = _family("qwen3_5_moe", "qwen3_5_moe_text", "Qwen3_5Moe", qwen3_5_moe="qwen3_5_moe_text")
FAMILIES = {model_type: one for one in (NEXT, DENSE, MOE) for model_type in one.classes}
