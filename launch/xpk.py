"""xpk: a GKE workload for each run, on TPU slices or GPU nodes, restarted when it fails or is pre-empted."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from hybridlm import untrusted
from hybridlm.fields import Count, Positive
from launch import engines
from launch.grid import Run
from launch.local import Job

NAME_LENGTH = 39  # xpk's limit is below 40


@dataclasses.dataclass(frozen=True)
class Settings:
    """cluster, project, zone: of GKE.  image: a Docker image with this package and its dependencies.
    type: --tpu-type such as v5p-8, or with gpu=true a --device-type such as h100-80gb-8.
    count: slices, or nodes, of one run.  output: where the runs go, a path mounted in the image.
    restarts: of a run that fails or is pre-empted.  priority: of the queue.
    """

    cluster: str
    image: str
    project: str = ""
    zone: str = ""
    type: str = "v5p-8"
    gpu: bool = False
    count: Positive = 1
    output: str = "/runs"
    restarts: Count = 3
    priority: str = "medium"


def write(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[Path]:
    """xpk.sh, which creates a workload for each run."""
    commands = [command(run, workdir, settings) for run in engines.runs(jobs)]
    return [engines.write(workdir / "xpk.sh", engines.script(commands), executable=True)]


def command(run: Run, workdir: Path, settings: Settings) -> list[str]:
    kind = ["--device-type", "--num-nodes"] if settings.gpu else ["--tpu-type", "--num-slices"]
    folder = f"--workdir={settings.output}/{workdir.name}/{run.name}"
    flags = {
        "--cluster": settings.cluster,
        "--workload": engines.kubernetes_name(run.name, NAME_LENGTH),
        kind[0]: settings.type,
        kind[1]: str(settings.count),
        "--docker-image": settings.image,
        "--max-restarts": str(settings.restarts),
        "--priority": settings.priority,
        "--project": settings.project,
        "--zone": settings.zone,
        "--command": untrusted.shell(["python", "train.py", *run.command(), folder, "--distributed=auto"]),
    }
    given = [word for name, value in flags.items() if value for word in (name, value)]
    return ["xpk", "workload", "create", *given]


def missing(settings: Settings) -> str:
    """Why nothing can be submitted from here; "" if it can."""
    return "" if shutil.which("xpk") else "the client `xpk` is not installed"


def submit(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[str]:
    """Names of the workloads."""
    for run in engines.runs(jobs):
        engines.call(command(run, workdir, settings), run.name)
    return [engines.kubernetes_name(run.name, NAME_LENGTH) for run in engines.runs(jobs)]
