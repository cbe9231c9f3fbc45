"""Settings that nothing reads as the others are: said at a start, since a user meant something by them."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from hybridlm import config as configs
from hybridlm import stages

# Field -> the one beside it that decides whether it is read, and the values of that with which it is.
READ_WITH: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "optimizer.muon_momentum": ("name", lambda name: name == "muon"),
    "optimizer.decay_fraction": ("schedule", lambda schedule: schedule == "wsd"),
    "optimizer.final_ratio": ("schedule", lambda schedule: schedule != "constant"),
    "checkpoint.best_metric": ("keep_best", bool),
    "eval.task_lengths": ("tasks", bool),
    "eval.task_samples": ("tasks", bool),
    "eval.sample_every_steps": ("sample_tokens", bool),
    "eval.sample_prompt": ("sample_tokens", bool),
    "eval.temperature": ("sample_tokens", bool),
    "data.holdout": ("val_path", operator.not_),
    "data.num_pairs": ("slices", operator.not_),
}


def override(config: configs.Config, field: str) -> str:
    """Why an override of ``field`` changes nothing in the resolved ``config``; "" if it may."""
    section, name = (*field.split("."), "")[:2]
    if section in configs.LAYERS and name not in getattr(config, section):
        return f"no layer of model.pattern names that {section[:-1].replace('mlp', 'MLP')}"
    if section == stages.FIELD and name not in config.stages:
        return "the stage is not in stages.order"
    overlays = [config.stages[one].get(section, {}) for one in config.stages.get(stages.ORDER, ())]
    if overlays and all(name in one or (section == "objective" and "kind" in one) for one in overlays):
        return "every stage has its own"
    reasons = [_unread(one, field.split(".")) for _, one in stages.split(config, configs.resolve)]
    return "" if "" in reasons else reasons[0]


def _unread(config: configs.Config, path: list[str]) -> str:
    """Why nothing reads the field at ``path``, by what stands beside it; "" where that may be."""
    owner: Any = config
    for part in path[:-1]:
        owner = owner.get(part) if isinstance(owner, Mapping) else getattr(owner, part, None)
    section, name = "data" if path[0] == "val" else path[0], path[-1]
    if section == "data" and name == "weight" and "components" not in path:
        return "these data are no part of a mixture"
    other, read = READ_WITH.get(f"{section}.{name}", ("", bool))
    value = getattr(owner, other, None)
    return "" if value is None or read(value) else f"{'.'.join([*path[:-1], other])} is {value!r}"


def ranking(config: configs.Config) -> str:
    """Why `checkpoint.keep_best` does not choose among all checkpoints; "" if it does."""
    keep, steps = config.checkpoint, config.train.steps
    section = "eval" if keep.best_metric == "val_loss" else "log"
    every = getattr(config, section).every_steps or steps  # 0: at the end only
    common = math.lcm(keep.every_steps, every)
    if not keep.keep_best or keep.every_steps in (0, common) or keep.every_steps >= steps:
        return ""
    when = f"of every {common} steps" if common < steps else "after the last step"
    said = f"{keep.best_metric} is known of checkpoints {when} alone, of all if checkpoint.every_steps"
    return f"{said} = {keep.every_steps} is a multiple of {section}.every_steps = {every}"
