"""Optimisers and learning-rate schedules, built from optax parts over the metadata of each parameter.

AdamW (Loshchilov & Hutter 2019) with decay * learning rate, as in PyTorch. Muon (Jordan 2024) for hidden
matrices, scaled to AdamW's RMS (Liu et al. 2025, arXiv:2502.16982, eq. 4: 0.2 * sqrt(max(in, out))), so that
one learning rate and one decay serve both; everything else in a Muon run takes AdamW.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from hybridlm import schema

MUON_RMS = 0.2
LEAST_EPS = 1e-20  # beside the root of a square that underflows

Schedule = Callable[[jax.Array], jax.Array]
Factors = Mapping[str, tuple[Any, Any]]


def schedule(config: schema.Optimizer, steps: int) -> Schedule:
    """Learning rate, float32, of the update that follows ``count`` updates in a run of ``steps``.

    Linear from peak/warmup_steps to the peak over the first ``warmup_steps`` updates, then by ``schedule``:
      constant: the peak.
      cosine: half a cosine, reaching peak * final_ratio at the last update.
      wsd: the peak until the last ``decay_fraction`` of the run, then linear to peak * final_ratio
        (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395).
    """
    peak, final, warmup = config.learning_rate, config.final_ratio, config.warmup_steps
    stable = steps - round(config.decay_fraction * steps) if config.schedule == "wsd" else 0
    decay_start = max(warmup, stable)
    decay_steps = max(1, steps - decay_start)

    def learning_rate(count: jax.Array) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1
        progress = jnp.clip((update - decay_start) / decay_steps, 0, 1)
        if config.schedule == "cosine":
            shape = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "wsd":
            shape = 1 - (1 - final) * progress
        else:
            shape = jnp.ones_like(progress)
        return peak * jnp.minimum(update / max(1, warmup), 1) * shape

    return learning_rate


def unwarmed(config: schema.Optimizer, steps: int) -> str:
    """Why the rate never comes to its peak in a run, or a stage, of ``steps``; "" if it does."""
    if config.warmup_steps <= steps:
        return ""
    end = config.learning_rate * steps / config.warmup_steps
    said = f"optimizer.warmup_steps = {config.warmup_steps} are more than its {steps} steps"
    return f"{said}: the learning rate ends at {end:.3g}, not {config.learning_rate:.3g}, and never decays"


def tame(config: schema.Optimizer, peak: float, factors: Factors) -> bool:
    """Whether gradients that are finite make updates that are, and weights, whatever they are.

    Where not, the step looks at them, and so reads and keeps all of them once more.
    b1^2 < b2 bounds AdamW's quotient (Kingma & Ba 2015, section 2.1), eps does so where squares underflow,
    and what Muon makes is orthogonal. ``peak``: the largest learning rate.
    """
    rates, decays = zip((1.0, 1.0), *factors.values(), strict=True)
    rate = peak * max(map(np.max, rates))
    shrinks = rate * config.weight_decay * max(map(np.max, decays)) <= 2
    return rate <= 1 and shrinks and config.b1**2 < config.b2 and config.eps >= LEAST_EPS


def ema_rate(decay: float, count: jax.Array) -> jax.Array:
    """The share of the new weights in their average after the update that follows ``count`` updates.

    (1 - decay) / (1 - decay^(count + 1)): the average is then that from zero with Adam's correction of its
    bias (Kingma & Ba 2015, section 3), which the weights at the start, random ones, have no part in.
    """
    past = jnp.asarray(count, jnp.float32) + 1
    return (1 - decay) / -jnp.expm1(past * math.log(decay))


def group(meta: Any) -> str:
    """The rule that a parameter of a Muon run follows: "muon", "decay" (AdamW) or "no_decay" (AdamW without).

    Parameters that decay are matrices in their last two axes; of those, Muon leaves out the embedding and the
    head (axis "vocab") and depthwise convolutions (axis "taps"), which are not maps between hidden vectors.
    """
    if not meta.decay:
        return "no_decay"
    return "decay" if {"vocab", "taps"} & set(meta.axes[-2:]) else "muon"


def build(
    config: schema.Optimizer, steps: int, metadata: Any, factors: Factors | None = None
) -> optax.GradientTransformation:
    """The transformation: clipping by global norm (``clip_norm``; 0: none), then the optimiser ``name``.

    metadata: tree of parameters with leaves that have ``axes`` and ``decay``.
    factors: of a flat dict of parameters, `hybridlm.groups`; those that it lacks have none.
    """
    is_meta = lambda leaf: hasattr(leaf, "decay")
    groups = jax.tree.map(group, metadata, is_leaf=is_meta)
    rate = schedule(config, steps)

    def adamw(weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            decayed(weight_decay, factors or {}),
            optax.scale_by_learning_rate(rate),
        )

    if config.name == "adamw":
        groups = jax.tree.map(lambda name: "decay" if name == "muon" else name, groups)
    rules = {
        "muon": muon(config, rate, factors or {}),
        "decay": adamw(config.weight_decay),
        "no_decay": adamw(0.0),
    }
    update = optax.partition({name: rules[name] for name in sorted(set(jax.tree.leaves(groups)))}, groups)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, update)  # with and without clipping of the same state: a resumed run may change


def decayed(weight_decay: float, factors: Factors) -> optax.GradientTransformation:
    """u -> rate * (u + weight_decay * decay * p), where (rate, decay) are the parameter's ``factors``."""

    def change(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        rate, decay = factors.get(str(getattr(path[-1], "key", "")), (1.0, 1.0))
        update = update + weight_decay * decay * param
        return update if isinstance(rate, float) and rate == 1 else rate * update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(change, updates, params))


def muon(config: schema.Optimizer, rate: Schedule, factors: Factors) -> optax.GradientTransformation:
    """Muon over the last two axes of each leaf; leading axes (stacked layers) are independent matrices."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    matrices = lambda updates: jax.tree.map(lambda _: matrix, updates)
    match_adamw = lambda update, _: MUON_RMS * max(update.shape[-2:]) ** 0.5 * update
    return optax.chain(
        contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=matrices),
        optax.stateless_with_tree_map(match_adamw),
        decayed(config.weight_decay, factors),
        optax.scale_by_learning_rate(rate),
    )
