"""Zamba2: Mamba-2 layers, and before some of them one of a few transformer blocks, which they share in turns.

A block is a name in `mixers` here: shared0, shared1 ... Source: transformers 5.24, models/zamba2. There
decoding with a cache lets dt fall below time_step_min, a pass over the whole does not; here neither does.
"""

import dataclasses
from typing import Any

from hybridlm import config as configs
from hybridlm.convert.family import NO_MLP, Architecture, Family, kinds, num_layers, outline, settings, types
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule
from hybridlm.errors import ConfigError
from hybridlm.mixers.shared_block import BLOCK, INNER, USE
from hybridlm.model import Definition

FORMAT, LINEAR, HYBRID = "zamba2", "linear_attention", "hybrid"
EARLIER = {"mamba": LINEAR}  # names of layers before transformers 5
USUAL = 54, (*range(6, 43, 6), 47, 51)  # layers, and the hybrid ones, where layers_block_type is missing
IDLE = (
    "attention_head_dim", "attention_hidden_size", "hybrid_layer_ids", "kv_channels", "num_query_groups",
    "mamba_headdim", "chunk_size", "use_mem_eff_path", "use_conv_bias", "use_mamba_kernels",
    "num_logits_to_keep", "time_step_max", "time_step_floor", "use_long_context",
)  # fmt: skip


def read(fields: Fields) -> Architecture:
    d_model, eps = fields.size("hidden_size"), fields.get("rms_norm_eps", 1e-5)
    blocks = _blocks(fields)
    fields.only("tie_word_embeddings", True)  # with an untied head, transformers unties the blocks, too
    known = kinds(FORMAT)
    [mamba, (kind, own)] = known[LINEAR], known[HYBRID]
    count = fields.size("num_mem_blocks", default=1)
    hybrid = [index for index, one in enumerate(blocks) if one == HYBRID]
    names = {index: f"shared{use % count}" for use, index in enumerate(hybrid)}
    mixers = dict.fromkeys(names.values(), configs.mixer(kind, **own.read(fields, d_model, eps)))
    mixers[INNER] = configs.mixer(mamba[0], **mamba[1].read(fields, d_model, eps))
    fields.ignore(*IDLE)
    model = settings(fields, d_model, eps, tied=True)
    layers = [f"{names.get(index, INNER)}/{NO_MLP}" for index in range(len(blocks))]
    return Architecture(layers, mixers, {NO_MLP: configs.mlp(NO_MLP)}, model)


def _blocks(fields: Fields) -> list[str]:
    layers, (usual, hybrid) = num_layers(fields), USUAL
    given = fields.layers("layers_block_type", (LINEAR, HYBRID, *EARLIER), layers)
    if given is None and layers != usual:
        raise fields.refuse("layers_block_type", f"is missing, which stands for {usual} layers, not {layers}")
    given = given or [HYBRID if index in hybrid else LINEAR for index in range(usual)]
    return [EARLIER.get(one, one) for one in given]


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    blocks = types(definition, FORMAT)
    names = {spec.mixer for spec, one in zip(definition.layers, blocks, strict=True) if one == HYBRID}
    if not names:
        raise ConfigError("model.pattern", definition.model.pattern, "has a layer of kind shared_block")
    if not definition.model.tie_embeddings:
        raise ConfigError("model.tie_embeddings", False, "shares blocks only beside a tied head")
    return outline(
        definition, FAMILY, model_type, "rms_norm_eps",
        layers_block_type=blocks, num_mem_blocks=len(names), hidden_act="gelu",
    )  # fmt: skip


class Zamba2(Family):
    def rules(self, definition: Definition) -> list[Rule]:
        """A block's tensors are those of the first layer that has it, with the adapters of all its layers."""
        first: dict[str, int] = {}
        use: dict[int, int] = {}
        for index, (spec, one) in enumerate(zip(definition.layers, types(definition, FORMAT), strict=True)):
            if one == HYBRID:
                first.setdefault(spec.mixer, index)
                use[index] = len(use)

        def placed(rule: Rule) -> Rule:
            if BLOCK not in rule.theirs[0]:
                return rule
            where, name, *_ = rule.ours[0].split(".")
            layer = first[name if where == "shared" else definition.layers[int(name)].mixer]
            start = f"{self.body}{self.layers}.{layer}.{BLOCK}"
            rest = [one.partition(BLOCK)[2] for one in rule.theirs]
            if where == "layers":
                rest = [one.replace(f".{USE}.", f".{use[int(name)]}.") for one in rest]
            return dataclasses.replace(rule, theirs=tuple(start + one for one in rest))

        return [placed(rule) for rule in super().rules(definition)]


FAMILY = Zamba2(
    FORMAT, {"zamba2": "Zamba2"}, read, write, norms=("input_layernorm", ""), final_norm="final_layernorm"
)
