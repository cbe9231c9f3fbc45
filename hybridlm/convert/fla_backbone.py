"""flash-linear-attention's models of the Mamba family: mamba2, log_linear_mamba2.

Every layer is of one kind. Mamba-2 has no MLP; the width of the other's follows from d_model. transformers
has a mamba2, too, with the same tensors and other names in config.json, which are read as well; an export has
both. Source: fla 0.6.0, fla/models; transformers 5.24, models/mamba2.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

FORMAT = "fla_backbone"
KINDS = family.kinds(FORMAT)
WITHOUT = {"mamba2": ("norm", "")}  # an MLP: names of their norms


def hidden(d_model: int) -> int:
    """fla's GatedMLP at a ratio of 4, which these configs cannot say otherwise."""
    return -(-int(d_model * 4 * 2 / 3) // 256) * 256


def read(fields: Fields) -> Architecture:
    kind, own = KINDS[fields.values["model_type"]]
    layers, d_model = family.num_layers(fields), fields.size("hidden_size")
    eps = fields.either("norm_eps", "layer_norm_epsilon", 1e-5)
    fields.only("hidden_act", "silu", "swish")
    fields.only("attnres_block_size", None)
    definitions = family.define(family.SHORT[kind], kind, own.read(fields, d_model, eps))
    model = family.settings(fields, d_model, eps, mlp_hidden=hidden(d_model))
    bare = own.layer_type in WITHOUT
    name = family.SHORT[kind] + f"/{family.NO_MLP}" * bare
    return Architecture(
        [name] * layers, definitions, {family.NO_MLP: configs.mlp(family.NO_MLP)} if bare else {}, model
    )


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    family.alone(definition, FORMAT, model_type)
    fields = family.outline(definition, FAMILY, model_type, hidden_act="silu")
    fields.pop("intermediate_size", None)
    if model_type in WITHOUT:
        fields["layer_norm_epsilon"] = definition.model.norm_eps
    return fields


FAMILY = Family(
    FORMAT, {model_type: own.architecture for model_type, (_, own) in KINDS.items()}, read, write,
    norms=("mixer_norm", "mlp_norm"), norms_of=WITHOUT, **family.BACKBONE,
)  # fmt: skip
