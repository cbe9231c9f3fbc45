"""Stages of a run: its steps in parts, each with settings of its own laid over those of the run.

    stages.order = ("transfer", "distil")
    stages.transfer = {"train": {"steps": 1000}, "objective": {"transfer": 1.0, "kl": 0.0}}
    stages.distil = {"train": {"steps": 4000}, "optimizer": {"learning_rate": 1e-4}}

One workdir, one count of steps, one order of data. A stage begins with the parameters that the one before
left in its last checkpoint, and with a fresh optimiser and schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from hybridlm import objectives, schema
from hybridlm.errors import ConfigError, nearest
from hybridlm.fields import Named, checked, fields, mapping, parse, under

if TYPE_CHECKING:
    from hybridlm.config import Config

Resolve = Callable[[ConfigDict], "Config"]  # `hybridlm.config.resolve`, which calls `complete`

SECTIONS = ("train", "optimizer", "objective")
FIELD = "stages"
ORDER = "order"


def complete(config: "Config", given: Mapping[str, Any], resolve: Resolve) -> "Config":
    """``config`` with the stages of ``given``, checked, and their steps added up as its own."""
    order = given.get(ORDER, ())
    if not isinstance(order, tuple | list) or not all(isinstance(name, str) for name in order):
        raise ConfigError(f"{FIELD}.{ORDER}", order, "must be a tuple of the stages' names")
    if len(set(order)) < len(order):
        raise ConfigError(f"{FIELD}.{ORDER}", order, "names a stage twice")
    if given and not order:
        problem = "must name the stages in the order that they are to run in"
        raise ConfigError(f"{FIELD}.{ORDER}", order, problem)
    if not order:
        return config
    kept: dict[str, Any] = {ORDER: tuple(order)}
    steps = 0
    for name in order:
        overlay = given.get(name)
        if not isinstance(overlay, Mapping):
            known = [one for one in given if one != ORDER]
            raise ConfigError(f"{FIELD}.{ORDER}", name, "there is no such stage", nearest(name, known))
        one = _laid_over(config, name, overlay, resolve)
        steps += one.train.steps
        values = {section: vars(getattr(one, section)) for section in overlay}
        kept[name] = Named({s: Named({f: values[s][f] for f in fields}) for s, fields in overlay.items()})
    return config.replace(train__steps=steps, stages=Named(kept))


def _laid_over(config: "Config", name: str, overlay: Mapping[str, Any], resolve: Resolve) -> "Config":
    """The config of one stage, of its own steps."""
    values = config.to_dict()
    values.pop(FIELD, None)
    values["train"]["profile_steps"] = ()  # of the run's own count, see `split`
    with under(f"{FIELD}.{name}"):
        for section, fields in overlay.items():
            if section not in SECTIONS:
                raise ConfigError(section, fields, "a stage has other " + ", ".join(SECTIONS) + " at most")
            mapping(fields, section)
            replaced = section == "objective" and "kind" in fields
            values[section] = dict(fields) if replaced else values[section] | dict(fields)
        if "steps" not in overlay.get("train", {}):
            raise ConfigError("train.steps", None, "must say how long the stage is")
        if "seed" in overlay["train"]:
            raise ConfigError("train.seed", overlay["train"]["seed"], "belongs to the run, not to a stage")
        one = resolve(ConfigDict(values))
        if one.optimizer.ema:  # its first steps are told by the count of all steps
            raise ConfigError("optimizer.ema", one.optimizer.ema, "must be 0 in a run with stages")
        return one


def override(config: dict[str, Any], field: str, text: str) -> None:
    """Sets in a config's values stages.order, or stages.<name>.<section>.<field>."""
    given, (name, *path) = config.setdefault("stages", {}), field.split(".")[1:]
    if name == ORDER and not path:
        given[name] = parse(tuple[str, ...], text)
    elif len(path) != 2 or path[0] not in SECTIONS:
        raise ConfigError(field, text, "fields here are stages.order and stages.<name>.<section>.<field>")
    else:
        section, last = path
        values = given.setdefault(name, {}).setdefault(section, {})
        kind = {**config.get(section, {}), **values, **({last: text} if last == "kind" else {})}
        described = fields(schema.SECTIONS.get(section) or objectives.config_class(str(kind.get("kind"))))
        if last not in described:
            raise ConfigError(field, text, "no such field", nearest(last, described))
        values[last] = checked(field, described[last], text, parse)


def split(config: "Config", resolve: Resolve) -> list[tuple[int, "Config"]]:
    """(step that it begins after, config with its last step as train.steps) of each stage; of a run without
    stages, the whole."""
    if not config.stages:
        return [(0, config)]
    found = []
    end = 0
    for name in config.stages[ORDER]:
        one = _laid_over(config, name, config.stages[name], resolve)
        begin, end = end, end + one.train.steps
        window = tuple(begin + step for step in one.train.profile_steps) or config.train.profile_steps
        found.append((begin, one.replace(train__steps=end, train__profile_steps=window)))
    return found


def last_steps(config: "Config") -> tuple[str, int]:
    """The field by which a run becomes longer, and its value."""
    if not config.stages:
        return "train.steps", config.train.steps
    last = config.stages[ORDER][-1]
    return f"{FIELD}.{last}.train.steps", config.stages[last]["train"]["steps"]


def parts(config: "Config", resolve: Resolve) -> list[tuple[int, int]]:
    """(last step, tokens of each of its steps) of each stage, which may have a batch and rows of its own."""
    each = [one.train for _, one in split(config, resolve)]
    return [(train.steps, train.batch_size * train.seq_len) for train in each]


def tokens(of: Sequence[Sequence[int]], after: int | None = None) -> int:
    """Trained on in the first ``after`` steps, or in all, of a run of these `parts`."""
    begin = total = 0
    for end, each in of:
        total += max(0, (end if after is None else min(end, after)) - begin) * each
        begin = end
    return total
