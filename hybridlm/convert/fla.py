"""flash-linear-attention's models and their hybrids with softmax attention.

A family for each kind that says "fla" in its ``public``; ``attn`` is null, one specification of the layers
that attend, or a list of such. Source: fla 0.6.0, fla/models and fla/layers.
"""

from typing import Any

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family, Unsayable
from hybridlm.convert.fields import Fields
from hybridlm.model import Definition

ATTENTION = "transformer"  # model_type of the layers that a hybrid's ``attn`` names
KINDS = family.kinds("fla")


def read(fields: Fields) -> Architecture:
    model_type, layers_ = fields.values["model_type"], family.num_layers(fields)
    d_model, eps = fields.size("hidden_size"), fields.get("norm_eps", 1e-6)
    fields.only("hidden_act", "swish")
    fields.only("elementwise_affine", True)
    fields.only("attnres_block_size", None)
    fields.only("norm_first", True, False)  # older configs; which of the two kernels, not where the norm is
    missing = 2 if model_type == "retnet" else 4  # fla's default of a field that is not there; null is 4
    ratio = fields.size("hidden_ratio", default=4) if "hidden_ratio" in fields.values else missing
    fields.ignore("hidden_ratio")
    hidden = fields.get("intermediate_size", 0) or -(-int(d_model * ratio * 2 / 3) // 256) * 256
    kind, own = KINDS[model_type]
    values = own.read(fields, d_model, eps)
    kind = values.pop("kind", kind)  # where one model_type has several
    name = family.SHORT[kind]
    definitions = family.define(name, kind, values)
    layers = [name] * layers_
    for number, (indices, definition) in enumerate(_attention(fields, d_model, layers_)):
        attention = f"attention_{number}"
        definitions[attention] = definition
        for index in indices:
            layers[index] = attention
    around = family.settings(fields, d_model, eps, mlp_hidden=hidden)
    return Architecture(layers, definitions, {}, around)


def _attention(fields: Fields, d_model: int, layers: int) -> list[tuple[list[int], ConfigDict]]:
    given = fields.get("attn") or []
    kind, own = KINDS[ATTENTION]
    found, seen = [], set[int]()
    for spec in given if isinstance(given, list) else [given]:
        if not isinstance(spec, dict):
            raise fields.refuse("attn", "must be a mapping, or a list of such")
        one = Fields(spec, f"{fields.source}: attn")
        indices = one.indices("layers", 0, layers - 1) or []
        if "layers" not in spec or seen.intersection(indices):
            raise one.refuse("layers", f"must list layers 0 to {layers - 1}, each in one specification")
        seen.update(indices)
        one.only("qk_norm", False)  # fla has it in its transformer alone
        if fields.values["model_type"] == "mom":  # which takes these from nobody
            one.only("qkv_bias", False)
            one.only("rope_theta", 10000.0)
        if indices:
            found.append((indices, configs.mixer(kind, **own.read(one, d_model, 0.0))))
            one.finish()
    return found


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    own = [s for s in definition.layers if family.mixer_format(s, "fla").layer_type == model_type]
    if not own:
        raise Unsayable("model.pattern", model_type, "has no layer of this kind")
    values = family.outline(definition, FAMILY, model_type, specs=own, hidden_act="swish")
    attn: list[dict[str, Any]] = []
    for index, spec in enumerate(definition.layers):
        said = family.mixer_format(spec, "fla")
        if spec in own or said.layer_type != ATTENTION:
            continue
        one = said.write(spec.config.explicit(definition.d_model), definition.d_model)
        del one["qk_norm"]
        same = next((other for other in attn if other | {"layers": []} == one | {"layers": []}), None)
        if same is None:
            attn.append(same := one | {"layers": []})
        same["layers"].append(index)
    if model_type != ATTENTION:
        values["attn"] = None if not attn else attn[0] if len(attn) == 1 else attn
    return values


def rename(name: str) -> str:
    for _, own in KINDS.values():
        for found, meant in own.aliases.items():
            name = name.replace(found, meant)
    return name


FAMILY = Family(
    "fla", {model_type: own.architecture for model_type, (_, own) in KINDS.items()}, read, write,
    norms=("attn_norm", "mlp_norm"), embedding="model.embeddings.weight", rename=rename,
)  # fmt: skip
