"""FLOPs that a training step does again because its forward pass did not keep them (`model.remat`).

Model FLOPs (`cost.train_flops_per_token`) with these are what HFU counts. What kernels do twice inside, such
as the scores in the backward pass of softmax attention, is in neither.
"""

import math
from typing import Any

import jax.extend.core

from hybridlm import model
from hybridlm.config import Config
from hybridlm.remat import ATTENTION, RECURRENCES

KERNELS = ("pallas_call", "core_map", "mpmd_map")  # of whose insides nothing is counted
AGAIN = "rematted_computation"  # what `jax.checkpoint` calls it


def flops(jaxpr: Any, config: Config, runs: int = 1) -> float:
    """Of one step of all devices, as traced for a resolved config.

    jaxpr: of the step.  runs: that are trained together in it.

    Products are counted one by one, a loop of unknown length as one turn, of branches the dearest. Where
    kernels of recurrences or of softmax attention run again, it is what the mixers with states, or with
    caches of keys and values, say that they cost (a layer with both counts as attention). Not taken off: what
    XLA finds twice and does once.
    """
    total, again = _count(jaxpr, False)
    definition, train = model.build(config), config.train
    costs = [spec.cost(definition.d_model, train.seq_len) for spec in definition.layers]
    of_attention = sum(cost.flops for cost in costs if cost.cache)
    of_states = sum(cost.flops for cost in costs if not cost.cache)
    per_token = of_attention * bool(again & set(ATTENTION)) + of_states * bool(again & set(RECURRENCES))
    return total + runs * train.batch_size * train.seq_len * per_token


def _count(jaxpr: Any, inside: bool) -> tuple[float, set[str]]:
    """(FLOPs of products, names of kernels that run) of what is computed again; inside: all of it is."""
    total, kernels = 0.0, set[str]()
    for one in jaxpr.eqns:
        name, marked = one.primitive.name, inside or AGAIN in str(one.source_info.name_stack)
        if marked and name in (*ATTENTION, *RECURRENCES):
            kernels.add(name)
        elif marked and name in PRODUCTS:
            total += PRODUCTS[name](one)
        else:
            inner = () if name in KERNELS else jax.extend.core.jaxprs_in_params(one.params)
            parts = [_count(part, marked) for part in inner]
            numbers = [number for number, _ in parts]
            total += _times(one) * (max(numbers) if name == "cond" else sum(numbers))
            kernels = kernels.union(*(names for _, names in parts))
    return total, kernels


def _dot(one: Any) -> float:
    (contracted, _), _ = one.params["dimension_numbers"]
    shape = one.invars[0].aval.shape
    return 2.0 * math.prod(shape[i] for i in contracted) * math.prod(one.outvars[0].aval.shape)


def _ragged(one: Any) -> float:
    """Each row times the matrix of its group."""
    return 2.0 * math.prod(one.outvars[0].aval.shape) * one.invars[0].aval.shape[-1]


PRODUCTS = {"dot_general": _dot, "ragged_dot": _ragged, "ragged_dot_general": _ragged}


def _times(one: Any) -> int:
    """How often it runs: turns of a loop, devices where each has its part."""
    if one.primitive.name == "shard_map":
        named = (axes for name, axes in one.params.items() if name.endswith("manual_axes"))  # of any jax
        axes = next(named, ())
        return math.prod(one.params["mesh"].shape[axis] for axis in axes)
    return one.params["length"] if one.primitive.name == "scan" else 1
