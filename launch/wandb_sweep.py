"""W&B sweeps: a grid over the runs' configs, so that `wandb agent` on any machine drives train.py."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from hybridlm.run import tracking
from launch import engines
from launch.local import Job
from launch.state import POINT


@dataclasses.dataclass(frozen=True)
class Settings:
    """project, entity: in W&B; an empty entity is the key's own."""

    project: str = "hybridlm"
    entity: str = ""


def write(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[Path]:
    """wandb.yaml. Its one parameter is the config: matched widths and steps belong to a point as a whole.

    Agents need the sweep's folder, where each run's point.json is, and where it trains.
    """
    runs = engines.runs(jobs)
    metric = {"name": "val_loss", "goal": "minimize"}
    if all(run.config.data.kind not in ("text", "shards", "mixture") for run in runs):
        metric = {"name": "val_accuracy", "goal": "maximize"}
    sweep = {
        "name": workdir.name,
        "project": settings.project,
        **({"entity": settings.entity} if settings.entity else {}),
        "program": "train.py",
        "method": "grid",
        "metric": metric,
        "parameters": {"config": {"values": [str(_shown(workdir) / run.name / POINT) for run in runs]}},
        "command": [
            "${env}", "python", "${program}", "${args}",
            "--config.log.wandb_mode=online", f"--config.log.project={settings.project}",
        ],
    }  # fmt: skip
    return [engines.write(workdir / "wandb.yaml", yaml.safe_dump(sweep, sort_keys=False))]


def _shown(workdir: Path) -> Path:
    """As the agents need it, and W&B keeps it: from where the command was given, where that is possible."""
    path = workdir.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else workdir


def missing(settings: Settings) -> str:
    """Why no sweep can be made from here; "" if it can."""
    if not tracking.has_key():
        return "there is no W&B key on this machine (`wandb login`)"
    return engines.without_clone()


def submit(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[str]:
    """The sweep's id, for `wandb agent`."""
    words = ["wandb", "sweep", str(workdir / "wandb.yaml")]
    return [engines.call(words, "the sweep", wanted=r"wandb agent (\S+)")]
