"""Sweep files: a base config and axes in, named points out.

A sweep file is Python with ``get_sweep()`` or ``get_sweep(arg)``, which returns a `Sweep`. Every point is a
config file and overrides, so that each is also a command line of train.py.

An axis sets, by its name,
    the argument of the base config      base "configs/hybrid.py:340m,{mixer},{ratio}" has {mixer} and {ratio}
    the layers                           mixer, ratio, placement: what `hybridlm.pattern.ratio` takes
    a field                              any dotted one; seed and learning_rate for short
    several fields                       values that are mappings: axis("size", small={"model.d_model": 64})
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hybridlm import config as configs
from hybridlm import config_file, cost, groups, pattern
from hybridlm.errors import ConfigError, nearest
from hybridlm.run import private

LAYERS = ("mixer", "ratio", "placement")
SHORT = {"seed": "train.seed", "learning_rate": "optimizer.learning_rate"}
NAME_BYTES = 200  # of a run; file systems take 255
RATIO = re.compile(r"[1-9][0-9]{0,8}:1")
INDICES = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")
PLACEHOLDER = re.compile(r"{(\w+)}")
NOT_A_FIELD = "names neither a field (section.field), nor mixer, ratio or placement, nor a part of the base"

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Axis:
    """points: what each step along the axis sets, axis names -> values; more than one name in a zip."""

    points: tuple[Point, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.points[0]) if self.points else ()


def axis(name: str, *values: Any, **labelled: Mapping[str, Any]) -> Axis:
    """One axis: ``values``, or label -> fields that go together."""
    return Axis(tuple({name: value} for value in (*values, *labelled.items())))


def zipped(*axes: Axis) -> Axis:
    """Axes of equal length that are walked together."""
    lengths = [len(one.points) for one in axes]
    if len(set(lengths)) > 1:
        names = ", ".join(name for one in axes for name in one.names)
        raise ConfigError("zipped", names, f"must have equally many values, here {lengths}")
    return Axis(tuple(map(_joined, zip(*(one.points for one in axes), strict=True))))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """base: a config as train.py takes it, {axis} in place of a part of its argument.
    axes: their grid is what is run.
    fields: set in every point: axis names and dotted fields -> values.
    also: points beside the grid; axes that one leaves out are crossed with it.
    keep: of the grid, only points for which it is true: axis name -> value.
    match: "parameters" gives every point the parameters of its all-attention stack through model.mlp_hidden;
        "" leaves widths alone.
    tokens: training tokens of a run, which decide train.steps; 0 leaves the steps to the base.
    vmap: runs that differ in seed and learning rate only are trained in one program on one device. For small
        models: the linear mixers then run on XLA, not on the kernels.
    """

    base: str
    axes: Sequence[Axis] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: Sequence[Point] = ()
    keep: Callable[[Point], bool] | None = None
    match: str = ""
    tokens: float = 0
    vmap: bool = False

    @property
    def placeholders(self) -> set[str]:
        """Axes that are a part of ``base``."""
        return set(PLACEHOLDER.findall(self.base))

    @property
    def names(self) -> list[str]:
        return [name for one in self.axes for name in one.names]


@dataclasses.dataclass(frozen=True)
class Run:
    """One point: its name, its place on each axis, the config it resolves to, what that is made of."""

    name: str
    point: dict[str, str]
    spec: str
    overrides: dict[str, str]
    config: configs.Config

    def command(self) -> list[str]:
        """Arguments of train.py that give the same run."""
        return [f"--config={self.spec}", *(f"--config.{k}={v}" for k, v in self.overrides.items())]


def load(spec: str) -> Sweep:
    """The sweep of "file.py" or "file.py:argument". Runs the file; ConfigError if it gives no sweep."""
    return config_file.run(spec, "get_sweep", Sweep)


def runs(sweep: Sweep, overrides: Mapping[str, str] | None = None) -> list[Run]:
    """Every point of ``sweep``, in the order of its axes, resolved, matched and named.

    overrides: fields of every point, text as on a command line.
    Raises ConfigError for axes that contradict each other or name nothing, for an empty grid, and for a point
    whose config cannot be.
    """
    _check(sweep, overrides or {})
    found: dict[str, Run] = {}
    known: dict[str, dict[str, str]] = {}
    for point in points(sweep):
        try:
            run = _run(sweep, point, overrides or {}, known)
        except ConfigError as error:
            shown = ", ".join(f"{k}={_label(v)}" for k, v in point.items() if k in sweep.names)
            raise ConfigError(error.field, error.value, f"{error.allowed} (at {shown})", error.fix) from None
        same = found.setdefault(run.name, run)
        if same.config != run.config:
            raise ConfigError("axes", run.name, "two points have this name", "Values need distinct names.")
    alike: dict[str, str] = {}
    for name, run in found.items():
        if (other := alike.setdefault(repr(run.config), name)) != name:
            problem = f"is the same run as {other}: what tells them apart changes nothing in it"
            raise ConfigError("axes", name, problem, "Leave one of them out with keep.")
    return list(found.values())


def points(sweep: Sweep) -> list[Point]:
    """Axis name -> value of every point, ``fields`` included; the same layers are listed once."""
    grid = [point for point in _crossed(sweep.axes) if sweep.keep is None or sweep.keep(point)]
    for extra in sweep.also:
        missing = [one for one in sweep.axes if not set(one.names) & set(extra)]
        grid += [dict(extra) | point for point in _crossed(missing)]
    if not grid:
        why = (
            "has an axis without values"
            if not all(one.points for one in sweep.axes)
            else "is empty: keep leaves none of its points"
        )
        raise ConfigError("axes", [list(one.names) for one in sweep.axes], f"the grid {why}")
    unique: dict[str, Point] = {}
    for point in grid:
        whole = {**sweep.fields, **point}
        if whole.get("ratio") in ("full", "pure") and not sweep.placeholders:
            whole["placement"] = ""
            if whole["ratio"] == "full":
                whole["mixer"] = whole.get("full", "full")
        unique.setdefault(repr(sorted(whole.items())), whole)
    return list(unique.values())


def _joined(parts: Iterable[Point]) -> Point:
    return {name: value for part in parts for name, value in part.items()}


def _crossed(axes: Sequence[Axis]) -> list[Point]:
    return list(map(_joined, itertools.product(*(one.points for one in axes))))


def _check(sweep: Sweep, overrides: Mapping[str, str]) -> None:
    names, placeholders = sweep.names, sweep.placeholders
    config_file.located(config_file.split(sweep.base)[0], "base")
    if sweep.match not in ("", "parameters"):
        raise ConfigError("match", sweep.match, "must be 'parameters' or ''")
    if not 0 <= sweep.tokens < math.inf:
        raise ConfigError("tokens", sweep.tokens, "must be a number of tokens, or 0")
    given = {*names, *sweep.fields, *(name for extra in sweep.also for name in extra)}
    for missing in sorted(placeholders - given):
        raise ConfigError("base", sweep.base, f"has {{{missing}}}, but no axis is called {missing!r}")
    setters: dict[str, str] = {}  # field -> the axis that sets it

    def claim(field: str, name: str) -> None:
        if field in setters:
            raise ConfigError("axes", [setters[field], name], f"both set {field}", "Zip them, or drop one.")
        setters[field] = name

    for one in sweep.axes:
        for name in one.names:
            value = one.points[0][name]
            if name in placeholders:
                claim(f"the base's {{{name}}}", name)
            elif _labelled(value):
                for field in dict.fromkeys(f for point in one.points for f in point[name][1]):
                    claim(SHORT.get(field, field), name)
            elif name in LAYERS:
                claim(f"the layers' {name}", name)
                setters["model.pattern"] = name
            elif "." in name or name in SHORT:
                claim(SHORT.get(name, name), name)
            else:
                raise ConfigError("axes", name, NOT_A_FIELD, nearest(name, (*LAYERS, *SHORT, *placeholders)))
    for name in names:
        if name == "model.pattern" and setters[name] != name:
            raise ConfigError("axes", [setters[name], name], f"both set {name}", "Zip them, or drop one.")
    for field in (*sweep.fields, *overrides):
        if SHORT.get(field, field) in setters and field not in LAYERS:
            raise ConfigError("axes", setters[SHORT.get(field, field)], f"{field} is also set for all points")
    if sweep.tokens and "train.steps" in setters:
        raise ConfigError("axes", "train.steps", "tokens already decides the steps", "Set tokens=0.")
    if sweep.match and "model.mlp_hidden" in setters:
        raise ConfigError("axes", "model.mlp_hidden", "match='parameters' already decides it")


def _run(sweep: Sweep, point: Point, overrides: Mapping[str, str], known: dict[str, dict[str, str]]) -> Run:
    """known: what was `_derived` of the points before, for this one to use and add to."""
    names, placeholders = sweep.names, sweep.placeholders
    spec = PLACEHOLDER.sub(lambda match: _label(point[match[1]]), sweep.base)
    fields: dict[str, Any] = {}
    for name, value in point.items():
        if name in placeholders or name in (*LAYERS, "full"):
            continue
        fields |= {SHORT.get(k, k): v for k, v in (value[1].items() if _labelled(value) else [(name, value)])}
    texts = {field: _text(value) for field, value in fields.items()} | dict(overrides)
    layers = {name: point[name] for name in LAYERS if name in point and name not in placeholders}
    shared = {field: text for field, text in texts.items() if field not in SHORT.values()}
    full = point.get("full", "full")
    key = repr((spec, shared, layers, full))  # seeds and learning rates decide none of what follows
    if key not in known:
        known[key] = _derived(sweep, spec, shared, layers, full)
    texts |= known[key]
    label = {
        name: private.hide(_label(point[name]))
        for name in dict.fromkeys((*names, *point))
        if name in (*LAYERS, *names)
    }
    bare = {name for name in label if name in (*LAYERS, *placeholders) or _labelled(point[name])}
    varying = {*names, *(name for extra in sweep.also for name in extra)}
    own = [v if k in bare else f"{k.split('.')[-1]}{v}" for k, v in label.items() if v and k in varying]
    config = _config(spec, texts)
    groups.check(config)
    return Run(_name("_".join(own)), label, spec, texts, config)


def _name(text: str) -> str:
    """``text`` as the name of a folder: letters, digits, ``_ . -``; none leads elsewhere or is too long."""
    name = re.sub(r"[^\w.]+", "-", text).strip("-.") or "run"
    if len(name.encode()) <= NAME_BYTES:
        return name
    return f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _derived(
    sweep: Sweep, spec: str, texts: dict[str, str], layers: Mapping[str, Any], full: str
) -> dict[str, str]:
    """The fields that follow from the others: pattern, steps, matched width."""
    found = {}
    if layers:
        found["model.pattern"] = _pattern(layers, full, _config(spec, texts))
    config = _config(spec, texts | found)
    if sweep.tokens and config.stages:
        fix = "Set stages.<name>.train.steps, and tokens=0."
        raise ConfigError("tokens", sweep.tokens, "decides train.steps, which stages add up to", fix)
    if sweep.tokens:
        found["train.steps"] = str(math.ceil(sweep.tokens / (config.train.batch_size * config.train.seq_len)))
    if sweep.match:
        found["model.mlp_hidden"] = str(_matched(spec, texts | found, full, config))
    return found


def _pattern(layers: Mapping[str, Any], full: str, config: configs.Config) -> str:
    mixer, ratio = layers.get("mixer", "kda"), str(layers.get("ratio", "pure"))
    depth = config.model.num_layers
    placement = layers.get("placement") or "last"
    if ratio in ("pure", "full"):
        return f"{mixer if ratio == 'pure' else full}*{depth}"
    if not RATIO.fullmatch(ratio):
        raise ConfigError("ratio", ratio, "must be pure, full or r:1, linear to full layers, such as 3:1")
    if isinstance(placement, str) and INDICES.fullmatch(placement):
        placement = [int(index) for index in placement.split(",")]
    return pattern.ratio(mixer, full, int(ratio[:-2]), depth, placement)


def _matched(spec: str, texts: Mapping[str, str], full: str, config: configs.Config) -> int:
    """The MLP width that gives ``config`` the parameters of attention alone, at its width and depth."""
    attention = dict(texts) | {"model.pattern": full}
    target = cost.parameters(_config(spec, attention))
    multiple = 64 if config.model.d_model >= 512 else 8
    hidden = cost.matched_mlp_hidden(config, target, multiple)
    reached = cost.parameters(_config(spec, {**texts, "model.mlp_hidden": str(hidden)}))
    if abs(reached / target - 1) > 0.02:
        problem = f"cannot bring {config.model.pattern!r} to the {target:,} parameters of attention"
        fix = f"It has {reached:,} at model.mlp_hidden={hidden}: give it fewer heads, or a wider MLP to all."
        raise ConfigError("match", "parameters", problem, fix)
    return hidden


def _config(spec: str, texts: Mapping[str, str]) -> configs.Config:
    return configs.resolve(configs.load(spec, texts))


def _labelled(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def _label(value: Any) -> str:
    return str(value[0]) if _labelled(value) else _text(value)


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, tuple | list) else str(value)
