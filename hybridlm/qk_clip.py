"""QK-Clip: projections of heads whose attention logits grow too large are scaled down (MuonClip; Kimi K2,
arXiv 2507.20534, section 2.1).

    S_h = max over the batch of the scaled logits of head h      g_h = min(1, tau / S_h)
    after the update:  W_q and W_k of head h times sqrt(g_h); where heads share a key, W_q times g_h alone

S is of the forward pass before the update, and has no gradient. A kind says which of its parameters take part
and how (`mixers.Config.clips`); it records S as "max.logit", which microbatches do not add up.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import mixers, stack
from hybridlm.block import Spec
from hybridlm.errors import ConfigError
from hybridlm.plan import Plan

RECORD = "max.logit"  # of a branch of a layer, "<branch>.max.logit"

Clip = tuple[str, Callable[[jax.Array, jax.Array], jax.Array]]


def check(tau: float, known: Mapping[str, mixers.Config], d_model: int) -> None:
    """ConfigError where optimizer.qk_clip = ``tau`` would clip none of the mixers ``known``."""
    if tau and not any(one.joined(known).clips(d_model, False) for one in known.values()):
        fix = "Layers of mla have, and of attention without qk_norm."
        raise ConfigError("optimizer.qk_clip", tau, "no layer has logits that could be clipped", fix)
    for name, one in known.items():
        if tau and one.full_attention and mixers.shares_module(one.kind):
            problem = f"cannot scale the projections of {name} down for one of the layers that share them"
            raise ConfigError("optimizer.qk_clip", tau, problem, "Set it to 0.")


def clips(spec: Spec, d_model: int) -> Mapping[str, Clip]:
    """Parameters of a layer that are clipped, by name in the mixer -> (record, (value, g_H) -> value)."""
    return spec.config.clips(d_model, bool(spec.leaves or spec.reuses))


def clipped(
    layout: Plan, d_model: int, params: Mapping[str, Any], records: Mapping[str, jax.Array], tau: float
) -> dict[str, jax.Array]:
    """Those of ``params`` (as `model.init` names them) that take part, after a batch of these ``records``."""
    found = {}
    specs = layout.items()
    for name, value in params.items():
        where = stack.stacked(layout, name)
        if where is None:
            continue
        _, layers, rest = where
        clip = clips(specs[layers.flat[0]], d_model).get(rest.removeprefix("mixer."))
        if clip is not None:
            record, scale = clip
            largest = jnp.stack([records[f"layers.{i}.{record}"] for i in layers.flat])
            g = tau / jnp.maximum(largest, tau).reshape(*layers.shape, -1)
            found[name] = jax.vmap(jax.vmap(scale))(value, g)
    return found


def largest(records: Mapping[str, jax.Array]) -> jax.Array:
    """The largest logit of all layers and heads."""
    return jnp.max(jnp.stack([jnp.max(value) for name, value in records.items() if name.endswith(RECORD)]))


def added(total: Any, part: Any) -> Any:
    """The sums of two microbatches, but of maxima the larger."""

    def add(path: tuple, one: jax.Array, other: jax.Array) -> jax.Array:
        largest = jax.tree_util.keystr(path, simple=True).endswith(RECORD)
        return jnp.maximum(one, other) if largest else one + other

    return jax.tree.map_with_path(add, total, part)
