"""Nemotron-H and Nemotron 3: Mamba-2, attention without rotation, squared ReLUs, dense or as experts.

A block there is a mixer or an MLP: an MLP here goes with the mixer before it, and one without is refused.
Source: transformers 5.24, models/nemotron_h.
"""

import dataclasses
import re
from typing import Any

from hybridlm import config as configs
from hybridlm import mlps
from hybridlm.convert import family
from hybridlm.convert.family import Architecture, Family
from hybridlm.convert.fields import MAX_LAYERS, Fields
from hybridlm.convert.rules import Rule
from hybridlm.model import Definition

FORMAT = "nemotron_h"
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
EARLIER = {"mamba": "linear_attention", "attention": "full_attention"}  # names before transformers 5
MLPS = {"mlp": "relu2", "moe": family.SPARSE}
IDLE = (
    "num_hidden_layers", "num_logits_to_keep", "use_mamba_kernels", "expand", "chunk_size", "time_step_max",
    "time_step_limit", "time_step_floor", "mamba_ssm_cache_dtype", "residual_in_fp32", "hidden_dropout",
    "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
)  # fmt: skip


def read(fields: Fields) -> Architecture:
    d_model, eps = fields.size("hidden_size"), fields.get("layer_norm_epsilon", 1e-5)
    for name, value in (("mlp_hidden_act", "relu2"), ("mlp_bias", False), ("sliding_window", None)):
        fields.only(name, value)
    fields.ignore(*IDLE)
    known = family.kinds(FORMAT)
    layers: list[str] = []
    for one in _blocks(fields):
        if one in known:
            layers.append(family.SHORT[known[one][0]])
        elif layers and "/" not in layers[-1]:
            layers[-1] += f"/{MLPS[one]}"
        else:
            raise fields.refuse(
                "layers_block_type", "must have a mixer before each MLP", "Blocks here are pairs."
            )
    found = family.definitions(fields, FORMAT, d_model, eps)
    mlp = {
        kind: configs.mlp(kind, **mlps.load(kind).public[FORMAT].read(fields, d_model, eps))
        for kind in (*MLPS.values(), family.NO_MLP)
    }
    model = family.settings(fields, d_model, eps)
    return Architecture(
        [one if "/" in one else f"{one}/{family.NO_MLP}" for one in layers], found, mlp, model
    )


def _blocks(fields: Fields) -> list[str]:
    text, given = fields.get("hybrid_override_pattern"), fields.get("layers_block_type")
    given = list(text) if given is None and isinstance(text, str) else given
    named = [LETTERS.get(one, EARLIER.get(one, one)) for one in given or () if isinstance(one, str)]
    if not (isinstance(given, list) and 0 < len(given) == len(named) <= MAX_LAYERS) or set(named) - {
        *LETTERS.values()
    }:
        raise fields.refuse(
            "layers_block_type", f"must list blocks, each one of {', '.join(LETTERS.values())}"
        )
    return named


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    by_kind = {kind: block for block, kind in MLPS.items()}
    blocks = []
    for spec in definition.layers:
        blocks.append(family.mixer_format(spec, FORMAT).layer_type)
        blocks += [by_kind[spec.mlp_kind]] if spec.mlp_kind in by_kind else []
    values = family.outline(
        definition, FAMILY, model_type, "layer_norm_epsilon",
        layers_block_type=blocks, mlp_hidden_act="relu2",
    )  # fmt: skip
    del values["num_hidden_layers"]  # of blocks
    return values


class NemotronH(Family):
    def rules(self, definition: Definition) -> list[Rule]:
        """A layer's MLP is the block after its mixer's there."""
        starts = [0]
        for spec in definition.layers:
            starts.append(starts[-1] + (1 if spec.mlp_kind == family.NO_MLP else 2))

        def placed(rule: Rule) -> Rule:
            found = re.match(r"layers\.(\d+)\.(mlp)?", rule.ours[0])
            if not found:
                return rule
            here = f"{self.body}layers.{starts[int(found[1])] + bool(found[2])}."
            names = (name.removeprefix(f"{self.body}layers.{found[1]}.") for name in rule.theirs)
            return dataclasses.replace(rule, theirs=tuple(here + name for name in names))

        return [placed(rule) for rule in super().rules(definition)]


FAMILY = NemotronH(
    FORMAT, {"nemotron_h": "NemotronH"}, read, write, norms=("norm", "norm"),
    unused=lambda values: ("mtp.",),
    **family.BACKBONE | {"rename": lambda name: name.replace("model.", "backbone.", 1)},
)  # fmt: skip
