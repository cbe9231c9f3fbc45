"""DeepSeek-V3's form (Moonlight, Kimi K2): MLA with rotation, first layers dense, then routed experts.

Source: transformers 5.24, models/deepseek_v3.
"""

from typing import Any

from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition


def read(fields: Fields) -> Architecture:
    layers, dense = family.num_layers(fields), fields.get("first_k_dense_replace", 3)
    fields.ignore(*family.PREDICTING)
    experts = [index >= dense for index in range(layers)]
    return family.assemble(fields, "deepseek_v3", ["full_attention"] * layers, experts)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    values = family.describe(definition, FAMILY, model_type)
    del values["layer_types"]
    return values | {"first_k_dense_replace": [*family.sparse(definition), True].index(True)}


FAMILY = Family(
    "deepseek_v3", {"deepseek_v3": "DeepseekV3", "kimi_k2": "DeepseekV3"}, read, write,
    unused=family.predicting,
)  # fmt: skip
