"""Falcon-H1: Mamba-2 and attention side by side in every layer, a SwiGLU after it, multipliers of everything.

An export has no multipliers of inputs: attention's is in that of its keys and of its output, the Mamba-2's in
those of its five projections. Source: transformers 5.24, models/falcon_h1.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm import mixers, mlps
from hybridlm.convert.family import Architecture, Family, kinds, num_layers, outline, settings, types
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import nearby
from hybridlm.mixers.parallel import FALCON
from hybridlm.model import Definition

FORMAT, MLP = "falcon_h1", "dense"
IDLE = ("mamba_chunk_size", "num_logits_to_keep", "mamba_use_mlp", "attn_rotary_emb", "mamba_expand")


def read(fields: Fields) -> Architecture:
    layers, d_model = num_layers(fields), fields.size("hidden_size")
    eps = fields.get("rms_norm_eps", 1e-5)
    fields.only("hidden_act", "silu")
    fields.only("projectors_bias", False)
    fields.ignore(*IDLE)
    parts = {
        name: configs.mixer(kind, **mixers.public(kind)["falcon_h1 branch"].read(fields, d_model, eps))
        for name, kind in FALCON.items()
    }
    [(kind, own)] = kinds(FORMAT).values()
    both = configs.mixer(kind, **own.read(fields, d_model, eps))
    mlp = configs.mlp("swiglu", **mlps.load("swiglu").public[FORMAT].read(fields, d_model, eps))
    multiplier = fields.get("embedding_multiplier", 1.0)
    model = settings(fields, d_model, eps, embedding_multiplier=multiplier, logit_divisor=_inverse(fields))
    return Architecture([f"{kind}/{MLP}"] * layers, parts | {kind: both}, {MLP: mlp}, model)


def _inverse(fields: Fields) -> float:
    multiplier = fields.get("lm_head_multiplier", 1.0)
    if multiplier <= 0:
        raise fields.refuse("lm_head_multiplier", "must be above 0")
    return 1 / multiplier


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    types(definition, FORMAT)  # refuses layers of other kinds
    model = definition.model
    return outline(
        definition, FAMILY, model_type, "rms_norm_eps",
        hidden_act="silu", embedding_multiplier=model.embedding_multiplier,
        lm_head_multiplier=nearby(lambda x: 1 / x, model.logit_divisor, 1 / model.logit_divisor),
    )  # fmt: skip


FAMILY = Family(
    FORMAT, {"falcon_h1": "FalconH1"}, read, write, norms=("input_layernorm", "pre_ff_layernorm"),
    final_norm="final_layernorm",
)  # fmt: skip
