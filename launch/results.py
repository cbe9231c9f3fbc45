"""What the runs of a sweep came to: their last numbers, and means over seeds with intervals. Only reads.

A sweep's folder may come from anywhere: its numbers are checked, its names lead nowhere else, its texts are
shown as text.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from eval import convergence
from eval.convergence import Convergence
from hybridlm import commands, stages, untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import private
from launch import machine, state

SEED, RATE = ("seed", "train.seed"), ("learning_rate", "optimizer.learning_rate")
LAYERS = ("mixer", "ratio", "placement")
HIGHER = ("recall",)  # metrics of which more is better
BOUNDS = {"recall": (0.0, 1.0), "loss": (0.0, math.inf)}
RUN = {
    "name": str, "point": {str: str}, "full_layers": [untrusted.NATURAL], "num_layers": untrusted.NATURAL,
    "steps": untrusted.NATURAL, "tokens": untrusted.NATURAL, "parameters": untrusted.NATURAL,
    "state_bytes": untrusted.NATURAL, "cache_bytes": untrusted.NATURAL, "width?": untrusted.NATURAL,
    "parts?": [[untrusted.NATURAL]], "learning_rate?": float, "guess?": {str: (float, type(None))},
}  # fmt: skip
COPIED = ("name", "full_layers", "num_layers", "parameters", "tokens", "steps")  # as they are there
SWEEP = {"runs": [RUN], "command?": str, "checkpoints?": bool}


class Result(NamedTuple):
    """One run. bytes: state and KV cache of one sequence.

    recall: accuracy on held-out examples of a task without text, else the mean of the recall tasks measured
        in the loop (`eval.tasks`); None without either.
    loss: held-out, nats per predicted token.
    tokens_per_second: None unless it can be compared: the run had its device to itself, and all runs that did
        were on the same kind of device.
    curves: "recall" and "loss" -> (training tokens, value) at each validation.
    guess: "recall" and "loss" -> what guessing gets, None where that is not known.
    learning_rate, width: None if the sweep was written by an older version.  commit, date: of the code and
        of the last start; "" if not noted.
    """

    name: str
    point: dict[str, str]
    state: str
    error: str
    full_layers: list[int]
    num_layers: int
    parameters: int
    bytes: int
    tokens: int
    steps: int
    recall: float | None
    loss: float | None
    tokens_per_second: float | None
    curves: dict[str, list[tuple[float, float]]]
    guess: dict[str, float | None]
    learning_rate: float | None
    width: int | None
    commit: str
    date: str
    device: str

    @property
    def convergence(self) -> Convergence | None:
        """Of recall; None if it was not measured while the run trained."""
        return convergence.of(self.curves["recall"], self.guess["recall"])

    @property
    def left_tokens(self) -> float | None:
        """Training tokens until it left the plateau; None if it has not, or is not known to."""
        return self.convergence.left if self.convergence else None

    @property
    def reached_tokens(self) -> float | None:
        """Until recall was 90%."""
        return self.convergence.reached if self.convergence else None

    @property
    def fraction(self) -> float:
        """Of its layers, those that are full."""
        return len(self.full_layers) / self.num_layers

    @property
    def others(self) -> tuple[str, ...]:
        """Its place on axes that are neither the layers' nor seed and learning rate."""
        return tuple(v for k, v in sorted(self.point.items()) if k not in (*LAYERS, *SEED, *RATE))

    @property
    def label(self) -> str:
        """Of the line that it is a point of."""
        return ", ".join([self.point.get("mixer", "") or "all", *self.others])


class Mean(NamedTuple):
    """Runs that differ in their seed only: mean of ``recall`` or ``loss``, and the ends of its 95% interval.

    The interval is Student's t over the seeds, within the metric's bounds; nan for a single one.
    """

    runs: tuple[Result, ...]
    value: float
    low: float
    high: float

    @property
    def fraction(self) -> float:
        return self.runs[0].fraction

    @property
    def label(self) -> str:
        return self.runs[0].label


def read(workdir: Path) -> tuple[dict[str, Any], list[Result]]:
    """(sweep.json, a result for each of its runs). ConfigError for a folder without a sweep."""
    path = workdir / "sweep.json"
    if not path.is_file():
        fix = f"{commands.typed('python -m launch.sweep')} writes one."
        raise ConfigError("workdir", str(workdir), "holds no sweep.json", fix)
    record = _checked(untrusted.read_json(path, "sweep.json", SWEEP), path)
    found = [_result(workdir, run, record["checkpoints"]) for run in record["runs"]]
    record["machines"] = sorted({one.device for one in found} - {""})
    if len({one.device for one in found if one.tokens_per_second}) > 1:
        found = [one._replace(tokens_per_second=None) for one in found]
    return record, found


def _checked(record: Any, path: Path) -> dict[str, Any]:
    """``record`` as a report reads it; ConfigError for what no sweep writes, though its types are right."""

    def need(met: bool, what: str) -> None:
        if not met:
            fix = "The command of the sweep writes it again."
            raise ConfigError("sweep.json", private.hide(str(path)), f"is no sweep: {what}", fix)

    names = [run["name"] for run in record["runs"]]
    need(len(set(names)) == len(names), "two runs have one name")
    for run in record["runs"]:
        name, full, layers = run["name"], run["full_layers"], run["num_layers"]
        untrusted.inside(path.parent, name, "sweep.json", links=True)
        need(min(layers, run["steps"], run["parameters"], run["tokens"]) > 0, f"a count of {name!r} is 0")
        need(all(len(part) == 2 for part in run.get("parts", ())), f"the parts of {name!r}")
        need(len(set(full)) == len(full) and all(index < layers for index in full), f"layers of {name!r}")
    return record | {
        "command": private.shown(record.get("command", "")),
        "checkpoints": record.get("checkpoints", True),
    }


def _result(workdir: Path, run: dict[str, Any], checkpoints: bool) -> Result:
    folder = workdir / run["name"]
    now = state.status(folder, run["steps"], sealed_runs=checkpoints)
    finished = now.state == "finished"
    try:
        records = state.lines(folder)
    except ConfigError:  # which is the run's error
        records = []
    speeds = [s for r in records[1:] if (s := state.number(r, "tokens_per_second")) is not None]
    starts = state.starts(folder)
    noted = starts[-1] if starts else {}
    alone = machine.alone(starts) and not any(state.number(r, "packed") not in (None, 1) for r in records)
    parts = run.get("parts", [[run["steps"], run["tokens"] // run["steps"]]])
    curves = {
        name: [(float(stages.tokens(parts, r["step"])), v) for r in records if (v := measure(r)) is not None]
        for name, measure in (("recall", _recall), ("loss", _loss))
    }
    return Result(
        **{name: run[name] for name in COPIED},
        point={private.shown(k): private.shown(v) for k, v in run["point"].items()},
        state=now.state,
        error=now.error,
        bytes=run["state_bytes"] + run["cache_bytes"],
        recall=_recall(now.last) if finished else None,
        loss=_loss(now.last) if finished else None,
        tokens_per_second=float(np.median(speeds)) if speeds and finished and alone else None,
        curves=curves,
        guess={name: state.number(run.get("guess", {}), name) for name in BOUNDS},
        learning_rate=state.number(run, "learning_rate"),
        width=run.get("width"),
        commit=_noted(noted, "commit"),
        date=_noted(noted, "date")[:10],
        device=_noted(noted, "device"),
    )


def _noted(start: dict[str, Any], name: str) -> str:
    return private.shown(start[name])[:80] if isinstance(start.get(name), str) else ""


def _recall(record: dict[str, Any]) -> float | None:
    if "val_accuracy" in record and "val_bpb" not in record:
        return state.number(record, "val_accuracy")
    tasks = [
        v for name in record if name.startswith("eval/") and (v := state.number(record, name)) is not None
    ]
    return float(np.mean(tasks)) if tasks else None


def _loss(record: dict[str, Any]) -> float | None:
    return state.number(record, "val_loss")


def means(results: Sequence[Result], metric: str) -> list[Mean]:
    """Means over seeds of the finished runs that have ``metric``; of several learning rates the best one.

    A rate at which a seed diverged is not the best by the others: only rates with the most runs are compared.
    """
    groups: dict[tuple, dict[str, list[Result]]] = {}
    for result in results:
        if getattr(result, metric) is None:
            continue
        rest = tuple(sorted((k, v) for k, v in result.point.items() if k not in SEED + RATE))
        rate = next((result.point[name] for name in RATE if name in result.point), "")
        groups.setdefault(rest, {}).setdefault(rate, []).append(result)
    sign = 1 if metric in HIGHER else -1
    return [
        max((_mean(runs, metric) for runs in rates.values()), key=lambda m: (len(m.runs), sign * m.value))
        for rates in groups.values()
    ]


def _mean(runs: Sequence[Result], metric: str) -> Mean:
    values = np.array([getattr(run, metric) for run in runs])
    value = float(values.mean())
    if len(values) == 1:
        return Mean(tuple(runs), value, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    least, most = BOUNDS[metric]
    return Mean(tuple(runs), value, max(least, value - half), min(most, value + half))


def placed(mean: Mean) -> bool:
    """Whether its full layers stand at indices of their own rather than at the end of each period."""
    return mean.runs[0].point.get("placement", "") not in ("", "last")


def by_mixer(found: Sequence[Mean]) -> dict[str, list[Mean]]:
    """Series over the share of full layers, placements left out; attention alone ends every one of them."""
    ends = [mean for mean in found if mean.fraction == 1]
    series: dict[str, list[Mean]] = {}
    for mean in found:
        if mean.fraction < 1 and not placed(mean):
            series.setdefault(mean.label, []).append(mean)
    if not series and ends:
        return {ends[0].label: ends}

    def whole(line: list[Mean]) -> list[Mean]:
        own = [end for end in ends if end.runs[0].others == line[0].runs[0].others]
        return sorted(line, key=lambda m: m.fraction) + own

    return {label: whole(line) for label, line in series.items()}


def front(found: Sequence[Mean], cost: dict[str, float], sign: int, metric_sign: int) -> list[Mean]:
    """Those that none beats in both: cost by run name, cheaper (sign -1) or more (1), and the metric."""
    order = sorted(found, key=lambda m: (-sign * cost[m.runs[0].name], -metric_sign * m.value))
    best, kept = -math.inf, []
    for mean in order:
        if metric_sign * mean.value > best:
            best = metric_sign * mean.value
            kept.append(mean)
    return kept


def under_budgets(found: Sequence[Mean], metric: str) -> list[tuple[int, Mean]]:
    """(budget in bytes, the best within it) for every budget at which the best changes."""
    sign = 1 if metric in HIGHER else -1
    kept = front(found, {m.runs[0].name: m.runs[0].bytes for m in found}, -1, sign)
    return [(mean.runs[0].bytes, mean) for mean in kept]


def table(results: Sequence[Result]) -> str:
    """results.csv: a row for each run."""
    fields = ("state", "learning_rate", "width", "full_layers", "num_layers", "parameters", "bytes", "tokens",
              "recall", "left_tokens", "reached_tokens", "loss", "tokens_per_second", "commit", "date",
              "device", "error")  # fmt: skip
    axes = [n for n in dict.fromkeys(n for result in results for n in result.point) if n not in fields]
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerow(["name", *map(_cell, axes), *fields])
    for result in results:
        values = [result.point.get(name, "") for name in axes] + [getattr(result, name) for name in fields]
        rows.writerow([_cell(value) for value in [result.name, *values]])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """As it is, but for a text that a spreadsheet would compute."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        try:
            float(value)
        except ValueError:
            return f"'{value}"
    return "" if value is None else value
