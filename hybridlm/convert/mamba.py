"""transformers' models of one kind of state space layer, without MLPs: Mamba, Falcon-Mamba.

transformers' Mamba-2 is beside FLA's, `hybridlm.convert.fla_backbone`. Fields of precision, kernels and
initialisation say nothing here; neither do those that only the original code (state-spaces/mamba) reads.
Source: transformers 5.24, models/mamba and models/falcon_mamba.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family, Unsayable
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

IDLE = (
    "residual_in_fp32", "use_mambapy", "use_falcon_mambapy", "use_associative_scan",
    "time_step_scale", "time_step_min", "time_step_max", "time_step_floor",
    "time_step_init_scheme", "d_inner", "d_model", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm",
    "pad_vocab_size_multiple",
)  # fmt: skip


def read(fields: Fields) -> Architecture:
    this = FAMILIES[fields.values["model_type"]]
    layers, d_model = family.num_layers(fields), fields.size("hidden_size")
    fields.only("hidden_act", "silu")
    fields.ignore(*IDLE)
    eps = fields.get("layer_norm_epsilon", 1e-5)
    [(kind, own)] = family.kinds(this.format).values()
    fields.only("intermediate_size", None, fields.get("expand", 2) * d_model)
    definition = configs.mixer(kind, **own.read(fields, d_model, eps))
    model = family.settings(fields, d_model, eps, tied=True)
    mlp = {"none": configs.mlp("none")}
    return Architecture([f"{family.SHORT[kind]}/none"] * layers, {family.SHORT[kind]: definition}, mlp, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.types(definition, model_type)  # refuses layers of other kinds
    for spec in definition.layers:
        if spec.mlp_kind != "none":
            raise Unsayable("mlps", spec.name, "has layers without MLPs alone")
    own = FAMILIES[model_type]
    return family.outline(definition, own, model_type, "layer_norm_epsilon", hidden_act="silu")


def _family(model_type: str, prefix: str) -> Family:
    return Family(model_type, {model_type: prefix}, read, write, norms=("norm", ""), **family.BACKBONE)


FAMILIES = {
    model_type: _family(model_type, prefix)
    for model_type, prefix in (("mamba", "Mamba"), ("falcon_mamba", "FalconMamba"))
}
