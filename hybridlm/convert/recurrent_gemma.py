"""RecurrentGemma (Griffin): RG-LRU blocks and local attention, GEGLU after each, (1+w) norms, capped logits.

Source: transformers 5.24, models/recurrent_gemma.
"""

from typing import Any

import ml_dtypes
import numpy as np

from hybridlm import config as configs
from hybridlm import mlps
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

FORMAT, MLP = "recurrent_gemma", "geglu"


def multiplier(d_model: int) -> float:
    """Of the embedding: the root of its width, which transformers holds in bfloat16."""
    return float(np.asarray(d_model**0.5, ml_dtypes.bfloat16))


def read(fields: Fields) -> Architecture:
    layers, d_model = family.num_layers(fields), fields.size("hidden_size")
    eps = fields.get("rms_norm_eps", 1e-6)
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.ignore("w_init_variance_scale", "final_w_init_variance_scale", "_block_types")
    known = family.kinds(FORMAT)
    blocks = fields.get("block_types") or ["recurrent", "recurrent", "attention"]
    if not (isinstance(blocks, list) and all(isinstance(one, str) and one in known for one in blocks)):
        raise fields.refuse("block_types", f"must list layers, each one of {', '.join(known)}")
    found = family.definitions(fields, FORMAT, d_model, eps)
    model = family.settings(
        fields, d_model, eps, tied=True, norm_unit_offset=True,
        embedding_multiplier=multiplier(d_model), logit_cap=fields.get("logits_soft_cap", 30.0),
    )  # fmt: skip
    mlp = configs.mlp(MLP, **mlps.load(MLP).public[FORMAT].read(fields, d_model, eps))
    names = [family.SHORT[known[blocks[index % len(blocks)]][0]] for index in range(layers)]
    return Architecture([f"{name}/{MLP}" for name in names], found, {MLP: mlp}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    if not definition.model.logit_cap:
        raise ConfigError("model.logit_cap", 0.0, "must be above 0 in this format")
    return family.outline(
        definition, FAMILY, model_type, "rms_norm_eps",
        block_types=family.types(definition, FORMAT), hidden_activation="gelu_pytorch_tanh",
        logits_soft_cap=definition.model.logit_cap,
    )  # fmt: skip


FAMILY = Family(
    FORMAT, {"recurrent_gemma": "RecurrentGemma"}, read, write,
    norms=("temporal_pre_norm", "channel_pre_norm"), final_norm="final_norm",
)  # fmt: skip
