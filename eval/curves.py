"""Accuracies that a run noted while it trained, from its metrics.jsonl."""

from pathlib import Path

from eval import tasks
from eval.convergence import Convergence, of
from eval.tasks import labelled
from hybridlm.config import Config
from hybridlm.run import logbook


def convergence(workdir: Path, config: Config) -> dict[str, Convergence]:
    """Of each accuracy in the run's metrics.jsonl: on held-out examples, and of tasks in the loop."""
    try:
        lines = logbook.read(workdir / "metrics.jsonl")
    except (OSError, ValueError, RecursionError):
        return {}
    per_step = config.train.batch_size * config.train.seq_len
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            wanted = name.startswith("eval/") or (name == "val_accuracy" and "val_bpb" not in line)
            if wanted and isinstance(value, int | float) and isinstance(line.get("step"), int):
                curves.setdefault(name, []).append((float(line["step"] * per_step), float(value)))
    found = {name: of(curve, _guess(name, config)) for name, curve in curves.items() if len(curve) > 1}
    return {name: one for name, one in found.items() if one is not None}


def _guess(name: str, config: Config) -> float | None:
    if name == "val_accuracy":
        return labelled.guess(config.data, config.model.vocab_size)[1]
    task = tasks.TASKS.get(name.removeprefix("eval/").rpartition("@")[0])
    return task.chance(config) if task else None
