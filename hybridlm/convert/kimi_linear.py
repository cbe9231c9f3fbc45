"""Kimi Linear: KDA and MLA without rotation, a first dense layer, then sigmoid-routed experts.

Sources: transformers 5.23, models/kimi_linear; the checkpoint layout is that of the released weights.
"""

from typing import Any

from hybridlm.convert import family
from hybridlm.convert.family import FULL, LINEAR, Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition


def read(fields: Fields) -> Architecture:
    layers = family.num_layers(fields)
    types = _layer_types(fields, layers)
    fields.ignore("model_max_length", *family.PREDICTING)
    return family.assemble(fields, "kimi_linear", types, family.first_dense(fields, layers, 1), eps=1e-5)


def _layer_types(fields: Fields, layers: int) -> list[str]:
    """layer_types, or the lists of linear_attn_config, which count from 1."""
    types = fields.layers("layer_types", family.kinds("kimi_linear"), layers)
    lists = fields.sub("linear_attn_config") or Fields({})
    full, kda = (lists.indices(name, 1, layers) for name in ("full_attn_layers", "kda_layers"))
    if full is None:
        return types or [FULL if index and index % 4 == 0 else LINEAR for index in range(layers)]
    if sorted([*full, *(kda or [])]) != list(range(1, layers + 1)):
        raise fields.refuse("linear_attn_config", f"must list layers 1 to {layers}, each once")
    counted = [FULL if index + 1 in full else LINEAR for index in range(layers)]
    if types and types != counted:
        raise fields.refuse("layer_types", "contradicts linear_attn_config")
    return counted


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.every_type(definition, "kimi_linear")
    family.untied(definition)
    values = family.describe(definition, FAMILY, model_type)
    places = lambda wanted: [at + 1 for at, one in enumerate(values["layer_types"]) if one == wanted]
    values["linear_attn_config"] |= {"full_attn_layers": places(FULL), "kda_layers": places(LINEAR)}
    return values | family.first_dense_fields(definition)


def rename(name: str) -> str:
    """transformers 5.23 saves a dense layer's MLP under the experts' prefix."""
    return name.replace(".block_sparse_moe.", ".mlp.")


FAMILY = Family(
    "kimi_linear", {"kimi_linear": "KimiLinear"}, read, write, rename=rename, unused=family.predicting
)
