"""Accuracies that a run noted while it trained, from its metrics.jsonl."""

from pathlib import Path

from eval import tasks
from eval.convergence import Convergence, of
from eval.tasks import labelled
from hybridlm import config as configs
from hybridlm import stages
from hybridlm.config import Config
from hybridlm.run import logbook


def convergence(workdir: Path, config: Config) -> dict[str, Convergence]:
    """Of each accuracy in the run's metrics.jsonl: on held-out examples, and of tasks in the loop."""
    try:
        lines = logbook.read(workdir / "metrics.jsonl")
    except (OSError, ValueError, RecursionError):
        return {}
    parts = stages.parts(config, configs.resolve)
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            wanted = name.startswith("eval/") or (name == "val_accuracy" and "val_bpb" not in line)
            if wanted and isinstance(value, int | float) and isinstance(line.get("step"), int):
                seen = stages.tokens(parts, line["step"])
                curves.setdefault(name, []).append((float(seen), float(value)))
    found = {name: of(curve, _guess(name, config)) for name, curve in curves.items() if len(curve) > 1}
    return {name: one for name, one in found.items() if one is not None}


def _guess(name: str, config: Config) -> float | None:
    if name == "val_accuracy":
        return labelled.guess(config.data, config.model.vocab_size)[1]
    task = tasks.TASKS.get(name.removeprefix("eval/").rpartition("@")[0])
    return task.chance(config) if task else None
