"""Checkpoints of hybridlm 0.1.0 as those of today: `python -m hybridlm.convert upgrade --workdir=DIR`.

0.1.0 stored layers as the scan had them, "segments.<segment>.<run>.<path>" [repeats, length, ...], planned so
that the last repetition of a segment might lack layers, whose places hold zeros. Here every parameter, and
what the optimiser keeps of it, goes under the name of its layer. One checkpoint at a time is in memory.

The new ones are written beside the old and get the name "checkpoints" when all are sealed; the old ones stay
as "checkpoints-0.1.0". A run that was killed in between is finished by the same command.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import model, pattern, plan, schema, sharding, untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint
from hybridlm.run.lock import Lock

log = logging.getLogger("hybridlm")

MAX_ABSENT = 0.1  # of the stack's layers, as 0.1.0 had it
OLD, WRITING, WHOLE = "checkpoints-0.1.0", "checkpoints-upgrading", "checkpoints-upgraded"


def upgrade(workdir: str | Path) -> list[int]:
    """Steps of the checkpoints that were rewritten. ConfigError where there is nothing to do."""
    workdir = Path(workdir).absolute()
    current = workdir / "checkpoints"
    with Lock(workdir):
        if not (workdir / WHOLE).exists():
            if not current.is_dir():
                raise ConfigError("--workdir", str(workdir), "holds no checkpoints")
            if (workdir / OLD).exists():
                raise ConfigError("--workdir", str(workdir), f"was upgraded before: {OLD} is there")
            shutil.rmtree(workdir / WRITING, ignore_errors=True)
            _rewrite(current, workdir / WRITING)
            (workdir / WRITING).rename(workdir / WHOLE)  # only now, when every checkpoint is sealed
        if current.exists() and not (workdir / OLD).exists():
            current.rename(workdir / OLD)
        (workdir / WHOLE).rename(current)
    return sorted(int(path.name) for path in current.iterdir() if untrusted.digits(path.name))


def _rewrite(current: Path, target: Path) -> None:
    with checkpoint.Checkpoints(current) as old:
        steps = old.steps()
        records = {step: old.record(step) for step in steps}
        if not steps or any("format" in record for record in records.values()):
            problem = "holds no checkpoints of hybridlm 0.1.0" if steps else "holds no checkpoint"
            raise ConfigError("--workdir", str(current.parent), problem, "There is nothing to upgrade.")
        for name, mlp in configs.of_run(current.parent).mlps.items():
            if getattr(mlp, "selection_bias", False):  # 0.1.0 never moved it
                rate = getattr(mlp, "bias_rate", 0.0)
                log.warning("mlps.%s.bias_rate = %g moves the selection bias from now on", name, rate)
        with checkpoint.Checkpoints(target, last=len(steps)) as new:
            for step in steps:
                log.info("checkpoint at step %d", step)
                config = configs.resolve(ConfigDict(records[step]["config"]))
                record = records[step] | {"config": configs.portable(config), "format": checkpoint.FORMAT}
                new.save(step, _state(old, step, config), record)


def _state(old: checkpoint.Checkpoints, step: int, config: configs.Config) -> dict[str, dict[str, Any]]:
    """The entries of a checkpoint by canonical names, in memory."""
    definition = model.build(config)
    found = places(pattern.fill(pattern.parse(config.model.pattern), config.model.num_layers))
    state = {}
    for entry, names in wanted(config, definition, old.directory / str(step)).items():
        stored = {name: _stored(name, found) for name in names}
        arrays = old.open(step, entry, dict.fromkeys(name for name, _ in stored.values()))
        state[entry] = {name: np.asarray(arrays[one][place]) for name, (one, place) in stored.items()}
        for name, shape in names.items():
            if state[entry][name].shape != shape:
                problem = f"{entry}: {name} is {state[entry][name].shape}, must be {shape}"
                raise ConfigError("--workdir", str(old.directory), problem)
    return state


def wanted(
    config: configs.Config, definition: model.Definition, path: Path
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Entry of the checkpoint at ``path`` -> canonical names and shapes of what this version wants of it.

    Optimiser states of parameters that are not trained any more, such as the experts' selection bias, are
    left behind.
    """
    from hybridlm import program  # which brings the optimiser; an imported model has none

    whole = {"params": model.canonical_shapes(definition)}
    if (path / "opt_state").is_dir():
        mesh = sharding.make_mesh(schema.Mesh(1, 1, 1))
        built = program.build(config, definition, mesh, None)
        whole = program.by_layer(definition, built)[2]
    return {entry: {name: leaf.shape for name, leaf in leaves.items()} for entry, leaves in whole.items()}


def _stored(name: str, found: Sequence["Place"]) -> tuple[str, tuple[int, ...]]:
    """(name in 0.1.0, index) of the canonical ``name``."""
    before, layers, after = name.rpartition("layers.")
    if not layers:
        return name, ()
    index, _, rest = after.partition(".")
    place = found[int(index)]
    return f"{before}segments.{place.segment}.{place.run}.{rest}", (place.repeat, place.offset)


# The planner of 0.1.0.


class Place(NamedTuple):
    """Where a layer's parameters lie: segment, run in it, [repeat, offset] in the run's stack."""

    segment: int
    run: int
    repeat: int
    offset: int


def places(names: Sequence[str]) -> list[Place]:
    """The place of each layer, by the items of its pattern."""
    found = []
    for number, (repeats, body, absent) in enumerate(_segments(names)):
        spread = [(run, at) for run, one in enumerate(plan.runs(body)) for at in range(one.length)]
        for repeat in range(repeats):
            left_out = absent if repeat == repeats - 1 else ()
            found += [
                Place(number, run, repeat, at)
                for index, (run, at) in enumerate(spread)
                if index not in left_out
            ]
    return found


def _segments(names: Sequence[str]) -> list[tuple[int, Sequence[str], tuple[int, ...]]]:
    """(repeats, period, what the last repetition leaves out) of each segment: head, body, tail.

    The plan with the fewest runs, then the fewest absent layers, then the fewest segments, then the longest
    body. A tail that is a repetition with layers left out becomes one, within MAX_ABSENT.
    """
    n = len(names)
    count = lambda start, stop: len(plan.runs(names[start:stop]))
    part = lambda repeats, start, stop, absent=(): (
        [(repeats, names[start:stop], absent)] if stop > start else []
    )
    best, segments = (count(0, n), 0, 1, -n - 1, 0, 0), part(1, 0, n)
    for period in range(1, n // 2 + 1):
        agree = 0  # names[head:] equals names[head + period:] for this many layers
        for head in range(n - period - 1, -1, -1):
            agree = agree + 1 if names[head] == names[head + period] else 0
            repeats = agree // period + 1
            if repeats == 1:
                continue
            end, stop = head + period, head + repeats * period
            traced = count(0, head) + count(head, end)
            absent = _missing(names[stop:], names[head:end]) if stop < n else None
            if absent is not None and len(absent) <= MAX_ABSENT * n:
                score = (traced, len(absent), 1 + (head > 0), head - stop, head, period)
                found = part(1, 0, head) + part(repeats + 1, head, end, absent)
            else:
                score = (traced + count(stop, n), 0, 1 + (head > 0) + (stop < n), head - stop, head, period)
                found = part(1, 0, head) + part(repeats, head, end) + part(1, stop, n)
            if score < best:
                best, segments = score, found
    return segments


def _missing(some: Sequence[str], whole: Sequence[str]) -> tuple[int, ...] | None:
    """Which items of ``whole`` to leave out to get ``some``; None where no choice does."""
    absent, taken = [], 0
    for place, name in enumerate(whole):
        if taken < len(some) and some[taken] == name:
            taken += 1
        else:
            absent.append(place)
    return tuple(absent) if taken == len(some) else None
