"""Ling 3's form: KDA with full matrices, MLA with a gate a head every few layers, then routed experts.

The names of tensors are those of released weights, which transformers writes, too.
Source: transformers 5.24, models/bailing_hybrid.
"""

import functools
from typing import Any

from hybridlm.convert import family
from hybridlm.convert.family import FULL, LINEAR, Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

FORMAT = "bailing_hybrid"


def read(fields: Fields) -> Architecture:
    layers, group = family.num_layers(fields), fields.size("layer_group_size", default=6)
    types = fields.layers("layer_types", family.kinds(FORMAT), layers)
    types = types or [LINEAR if (index + 1) % group else FULL for index in range(layers)]
    fields.only("tie_word_embeddings", False)  # transformers ties nothing there
    fields.ignore("model_max_length", "mtp_loss_scaling_factor", *family.PREDICTING)
    return family.assemble(fields, FORMAT, types, family.first_dense(fields, layers, 2))


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.untied(definition)
    values = family.describe(definition, FAMILY, model_type)
    group = [*values["layer_types"], FULL].index(FULL) + 1
    return (
        values | {"layer_group_size": group, family.PREDICTING[0]: 0} | family.first_dense_fields(definition)
    )


FAMILY = Family(
    FORMAT, {FORMAT: "BailingHybrid"}, read, write, embedding="model.word_embeddings.weight",
    unused=functools.partial(family.predicting, default=1),
)  # fmt: skip
