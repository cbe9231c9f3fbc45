"""MiniMax-Text-01's form: lightning attention, softmax attention now and then, experts in every layer.

Each half of a block norms the stream itself, and weighs it and what it adds (`model.stream_norm`). Decays of
lightning attention, which are no parameters, are among the tensors of a checkpoint.
Source: transformers 5.24, models/minimax.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from hybridlm.convert import family
from hybridlm.convert.family import FULL, LINEAR, Architecture, Family, Unsayable
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule, derived
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

NAMES = {FULL: "full_attn", LINEAR: "linear_attn", "": "mlp"}  # of the factors; "": of every MLP
BLOCK, MAX_BLOCK = 256, 4096
MAX_FACTOR = 1e5


def read(fields: Fields) -> Architecture:
    layers = family.num_layers(fields)
    found = fields.layers("layer_types", (FULL, LINEAR), layers)
    found = found or [LINEAR if index % 2 else FULL for index in range(layers)]
    fields.size("block_size", MAX_BLOCK, default=BLOCK)
    halves = {family.SHORT[kind]: name for name, (kind, _) in family.kinds("minimax").items()}
    streams = [f"{mixer}.mixer={_factors(fields, of)}" for mixer, of in halves.items() if of in found]
    streams.append(f"*.mlp={_factors(fields, '')}")
    for name in NAMES:  # of layers that are not there
        _factors(fields, name)
    return family.assemble(fields, "minimax", found, [True] * layers, eps=1e-5, stream_norm=tuple(streams))


def _factors(fields: Fields, half: str) -> str:
    names = [f"{NAMES[half]}_{side}_factor" for side in ("alpha", "beta")]
    values = [fields.get(name, 1.0) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 1e-5 <= value < MAX_FACTOR:
            raise fields.refuse(name, f"must be from 1e-05 to {MAX_FACTOR:,.0f}")
    return "/".join(map(repr, values))


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    if not all(family.sparse(definition)):
        raise Unsayable("model.pattern", definition.model.pattern, "has experts in every layer")
    values = family.describe(definition, FAMILY, model_type) | {"block_size": BLOCK}
    for spec, kind in zip(definition.layers, family.types(definition, "minimax"), strict=True):
        stream = dict(spec.stream)
        for half, name in (("mixer", NAMES[kind]), ("mlp", NAMES[""])):
            if half not in stream:
                problem = "has blocks whose halves norm the stream itself"
                raise ConfigError("model.stream_norm", definition.model.stream_norm, problem)
            for side, value in zip(("alpha", "beta"), stream[half], strict=True):
                values[f"{name}_{side}_factor"] = value
    return values


def decays(definition: Definition, values: Mapping[str, Any]) -> list[Rule]:
    """Rules of what transformers keeps of lightning attention's decays."""
    found, block = [], values.get("block_size") or BLOCK
    for index, kind in enumerate(family.types(definition, "minimax")):
        if kind == LINEAR:
            heads = definition.layers[index].config.explicit(definition.d_model).num_heads
            shapes = {
                "slope_rate": (heads, 1, 1),
                "query_decay": (heads, block, 1),
                "key_decay": (heads, block, 1),
                "diagonal_decay": (1, heads, block, block),
            }
            for name, shape in shapes.items():
                make = partial(_decay, name, heads, index, len(definition.layers), block)
                found.append(derived(f"model.layers.{index}.self_attn.{name}", shape, make))
    return found


def _decay(name: str, heads: int, layer: int, num_layers: int, block: int) -> np.ndarray:
    """In PyTorch's order of roundings; its exponential may still differ in the last place."""
    power = np.float64(np.float32(2 ** (-8 / heads))) ** np.arange(1, heads + 1)
    factor = np.float32(1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    slopes_H11 = (power.astype(np.float32) * factor)[:, None, None]
    if name == "slope_rate":
        return slopes_H11
    place_B = np.arange(1, block + 1, dtype=np.float32)
    past = {
        "query_decay": place_B[:, None],
        "key_decay": block - place_B[:, None],
        "diagonal_decay": place_B[:, None] - place_B,
    }[name]
    exponent = np.where(past >= 0, -(slopes_H11 * past), -np.inf)
    decay = np.exp(exponent.astype(np.float64)).astype(np.float32)
    return decay[None] if name == "diagonal_decay" else decay


FAMILY = Family("minimax", {"minimax": "MiniMax"}, read, write, derived=decays)
