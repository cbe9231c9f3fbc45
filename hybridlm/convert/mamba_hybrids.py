"""Mamba layers beside softmax attention, an MLP after each: Bamba, Granite 4 (both Mamba-2), Jamba (Mamba).

Source: transformers 5.24, models/bamba, models/granitemoehybrid and models/jamba.
"""

from typing import Any

from hybridlm.convert import family
from hybridlm.convert.family import FULL, LINEAR, Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

EARLIER = {"attention": FULL, "mamba": LINEAR}  # names of layers before transformers 5
IDLE = ("mamba_chunk_size", "num_logits_to_keep", "use_mamba_kernels", "use_mambapy", "use_associative_scan",
        "calc_logits_for_entire_prompt", "n_ctx")  # fmt: skip


def read_bamba(fields: Fields) -> Architecture:
    layers = family.num_layers(fields)
    full = fields.indices("attn_layer_indices", 0, layers - 1) or []
    fields.only("mlp_bias", False)
    fields.only("partial_rotary_factor", 0.5)
    fields.ignore("z_loss_coefficient", "attn_rotary_emb", *IDLE)
    types = [FULL if index in full else LINEAR for index in range(layers)]
    return family.assemble(fields, "bamba", types, [False] * layers, eps=1e-5)


def write_bamba(definition: Definition, model_type: str) -> dict[str, Any]:
    family.every_type(definition, "bamba")
    values = family.describe(definition, BAMBA, model_type)
    return values | {"attn_layer_indices": _places(values.pop("layer_types"))}


def read_granite(fields: Fields) -> Architecture:
    layers = family.num_layers(fields)
    types = fields.layers("layer_types", (FULL, LINEAR, *EARLIER), layers) or [LINEAR] * layers
    experts = fields.get("num_local_experts", 8) > 0
    multipliers = {name: fields.get(name, 1.0) for name in ("embedding_multiplier", "residual_multiplier")}
    fields.ignore("mamba_chunk_size", "init_method", "normalization_function", "layers_block_type")
    return family.assemble(
        fields,
        "granitemoehybrid",
        [EARLIER.get(one, one) for one in types],
        [experts] * layers,
        hidden="shared_intermediate_size",
        logit_divisor=fields.get("logits_scaling", 1.0),
        **multipliers,
    )


def write_granite(definition: Definition, model_type: str) -> dict[str, Any]:
    family.every_type(definition, "granitemoehybrid")
    model = definition.model
    return family.describe(definition, GRANITE, model_type) | {
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "logits_scaling": model.logit_divisor,
    }


def read_jamba(fields: Fields) -> Architecture:
    layers = family.num_layers(fields)
    full = _periodic(fields, "attn_layer", layers, 8, 4)
    experts = _periodic(fields, "expert_layer", layers, 2, 1)
    if fields.size("num_experts", default=16) == 1:
        experts = [False] * layers
    fields.only("mamba_inner_layernorms", True)
    fields.only("sliding_window", None)
    fields.ignore(*IDLE)
    return family.assemble(fields, "jamba", [FULL if one else LINEAR for one in full], experts)


def _periodic(fields: Fields, name: str, layers: int, period: int, offset: int) -> list[bool]:
    period, offset = fields.size(f"{name}_period", default=period), fields.get(f"{name}_offset", offset)
    if not 0 <= offset < period:
        raise fields.refuse(f"{name}_offset", f"must be from 0 to {name}_period - 1 = {period - 1}")
    return [index % period == offset for index in range(layers)]


def write_jamba(definition: Definition, model_type: str) -> dict[str, Any]:
    family.every_type(definition, "jamba")
    values = family.describe(definition, JAMBA, model_type)
    experts = [index for index, has in enumerate(family.sparse(definition)) if has]
    values |= _period("attn_layer", _places(values.pop("layer_types")), len(definition.layers))
    values |= _period("expert_layer", experts, len(definition.layers))
    return values | ({} if experts else {"num_experts": 1})


def _period(name: str, places: list[int], layers: int) -> dict[str, int]:
    """Of the first two places, if they are all; reading it back says whether."""
    period = places[1] - places[0] if len(places) > 1 else layers + 1
    offset = places[0] if places else layers
    return {f"{name}_period": period, f"{name}_offset": offset}


def _places(types: list[str]) -> list[int]:
    return [index for index, one in enumerate(types) if one == FULL]


# Of Bamba and Jamba.
NAMES: dict[str, Any] = {"norms": ("input_layernorm", "pre_ff_layernorm"), "final_norm": "final_layernorm"}
BAMBA = Family("bamba", {"bamba": "Bamba"}, read_bamba, write_bamba, **NAMES)
GRANITE = Family("granitemoehybrid", {"granitemoehybrid": "GraniteMoeHybrid"}, read_granite, write_granite)
JAMBA = Family("jamba", {"jamba": "Jamba"}, read_jamba, write_jamba, **NAMES)
FAMILIES = (BAMBA, GRANITE, JAMBA)
