"""What the runs of a sweep came to: their last numbers, and means over seeds with intervals."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hybridlm.errors import ConfigError
from hybridlm.run import logbook
from launch import worker
from launch.local import status

SEED, RATE = ("seed", "train.seed"), ("learning_rate", "optimizer.learning_rate")
COPIED = ("name", "point", "full_layers", "num_layers", "parameters", "tokens", "steps")  # from sweep.json
HIGHER = ("recall",)  # metrics of which more is better


class Result(NamedTuple):
    """One run. fraction: of its layers that are full.  bytes: state and KV cache of one sequence.

    recall: accuracy on held-out examples of a task without text, else the mean of the recall tasks measured
        in the loop (`eval.tasks`); None without either.
    loss: held-out, nats per token; None for a task without text.
    curves: "recall" and "loss" -> (training tokens, value) at each validation.
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

    @property
    def fraction(self) -> float:
        return len(self.full_layers) / self.num_layers

    @property
    def mixer(self) -> str:
        return self.point.get("mixer", "") or "all"


class Mean(NamedTuple):
    """Runs that differ in their seed only: mean of ``recall`` or ``loss``, and half its 95% interval.

    The interval is Student's t over the seeds; nan for a single one.
    """

    runs: tuple[Result, ...]
    value: float
    half: float

    @property
    def fraction(self) -> float:
        return self.runs[0].fraction


def read(workdir: Path) -> tuple[dict[str, Any], list[Result]]:
    """(sweep.json, a result for each of its runs). ConfigError for a folder without a sweep."""
    path = workdir / "sweep.json"
    if not path.is_file():
        raise ConfigError(
            "workdir", str(workdir), "holds no sweep.json", "python -m launch.sweep writes one."
        )
    record = json.loads(path.read_text())
    machines = [workdir / run["name"] / worker.MACHINE for run in record["runs"]]
    record["machines"] = sorted({path.read_text().strip() for path in machines if path.is_file()})
    return record, [_result(workdir / run["name"], run) for run in record["runs"]]


def _result(folder: Path, run: dict[str, Any]) -> Result:
    records = logbook.read(folder / "metrics.jsonl")
    now = status(folder, run["steps"])
    last = records[-1] if records else {}
    speeds = [r["tokens_per_second"] for r in records[1:] if "tokens_per_second" in r]
    per_step = run["tokens"] / run["steps"]
    finished = now.state == "finished"
    at = [r["step"] * per_step for r in records]
    lines = {
        "recall": list(zip(at, map(_recall, records), strict=True)),
        "loss": list(zip(at, map(_loss, records), strict=True)),
    }
    return Result(
        **{key: run[key] for key in COPIED},
        state=now.state,
        error=now.error,
        bytes=run["state_bytes"] + run["cache_bytes"],
        recall=_recall(last) if finished else None,
        loss=_loss(last) if finished else None,
        tokens_per_second=float(np.median(speeds)) if speeds and finished else None,
        curves={
            name: [(at, value) for at, value in line if value is not None] for name, line in lines.items()
        },
    )


def _recall(record: dict[str, Any]) -> float | None:
    if "val_accuracy" in record and "val_bpb" not in record:
        return record["val_accuracy"]
    tasks = [value for name, value in record.items() if name.startswith("eval/")]
    return float(np.mean(tasks)) if tasks else None


def _loss(record: dict[str, Any]) -> float | None:
    return record.get("val_loss") if "val_bpb" in record else None


def means(results: Sequence[Result], metric: str) -> list[Mean]:
    """Means over seeds of the finished runs that have ``metric``; of several learning rates the best one."""
    groups: dict[tuple, dict[str, list[Result]]] = {}
    for result in results:
        if getattr(result, metric) is None:
            continue
        rest = tuple(sorted((k, v) for k, v in result.point.items() if k not in SEED + RATE))
        rate = next((result.point[name] for name in RATE if name in result.point), "")
        groups.setdefault(rest, {}).setdefault(rate, []).append(result)
    sign = 1 if metric in HIGHER else -1
    return [
        max((_mean(runs, metric) for runs in rates.values()), key=lambda m: sign * m.value)
        for rates in groups.values()
    ]


def _mean(runs: Sequence[Result], metric: str) -> Mean:
    values = np.array([getattr(run, metric) for run in runs])
    half = math.nan
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Mean(tuple(runs), float(values.mean()), half)


def placed(mean: Mean) -> bool:
    """Whether its full layers stand at indices of their own rather than at the end of each period."""
    return mean.runs[0].point.get("placement", "") not in ("", "last")


def by_mixer(found: Sequence[Mean]) -> dict[str, list[Mean]]:
    """Series over the share of full layers, placements left out; attention alone ends every one of them."""
    ends = [mean for mean in found if mean.fraction == 1]
    series: dict[str, list[Mean]] = {}
    for mean in found:
        if mean.fraction < 1 and not placed(mean):
            series.setdefault(mean.runs[0].mixer, []).append(mean)
    if not series and ends:
        return {ends[0].runs[0].mixer: ends}
    return {mixer: sorted(line, key=lambda m: m.fraction) + ends for mixer, line in series.items()}


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


def write_csv(results: Sequence[Result], path: Path) -> None:
    axes = list(dict.fromkeys(name for result in results for name in result.point))
    fields = (
        "state",
        "full_layers",
        "num_layers",
        "parameters",
        "bytes",
        "tokens",
        "recall",
        "loss",
        "tokens_per_second",
        "error",
    )
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", *axes, *fields])
        for result in results:
            values = [getattr(result, name) for name in fields]
            shown = ["" if v is None else " ".join(map(str, v)) if isinstance(v, list) else v for v in values]
            rows.writerow([result.name, *(result.point.get(name, "") for name in axes), *shown])
