"""SkyPilot: one task file, and a managed job for each run, which SkyPilot starts again after pre-emption."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from hybridlm import untrusted
from hybridlm.fields import Positive
from launch import engines
from launch.grid import Run
from launch.local import Job

SETUP = "pip install -q -e '.[cuda]'"
HEAD = '"$(echo "$SKYPILOT_NODE_IPS" | head -n1):8476,$SKYPILOT_NUM_NODES,$SKYPILOT_NODE_RANK"'


@dataclasses.dataclass(frozen=True)
class Settings:
    """accelerators: of a node, as SkyPilot names them.  nodes: of one run.  spot: pre-emptible machines.
    bucket: name of the bucket that keeps the runs; it is mounted at /runs on every machine.
    data: a folder or bucket mounted at ~/sky_workdir/data; "" for configs that need none.
    """

    accelerators: str = "H100:8"
    nodes: Positive = 1
    spot: bool = True
    bucket: str = "hybridlm-runs"
    data: str = ""


def write(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[Path]:
    """skypilot.yaml, the task, and skypilot.sh, which submits it once for each run."""
    mounts: dict[str, object] = {"/runs": {"name": settings.bucket, "mode": "MOUNT"}}
    if settings.data:
        mounts["~/sky_workdir/data"] = settings.data
    several = f" --distributed={HEAD}" if settings.nodes > 1 else ""
    folder = untrusted.shell([f"/runs/{workdir.name}"])
    task = {
        "name": _name(workdir.name),
        "resources": {"accelerators": settings.accelerators, "use_spot": settings.spot},
        "num_nodes": settings.nodes,
        "workdir": ".",
        "file_mounts": mounts,
        "envs": {"RUN": "", "ARGUMENTS": ""},
        "setup": SETUP,
        # ARGUMENTS are quoted for a shell: eval takes them apart again, and nothing else.
        "run": f'eval "set -- $ARGUMENTS"\npython train.py "$@" --workdir={folder}/"$RUN"{several}\n',
    }
    path = engines.write(workdir / "skypilot.yaml", yaml.safe_dump(task, sort_keys=False))
    commands = [command(run, path) for run in engines.runs(jobs)]
    return [path, engines.write(workdir / "skypilot.sh", engines.script(commands), executable=True)]


def command(run: Run, task: Path) -> list[str]:
    environment = [f"RUN={run.name}", f"ARGUMENTS={untrusted.shell(run.command())}"]
    flags = [word for text in environment for word in ("--env", text)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", _name(run.name), *flags, str(task)]


def missing(settings: Settings) -> str:
    """Why nothing can be submitted from here; "" if it can."""
    if not shutil.which("sky"):
        return "SkyPilot's client `sky` is not installed"
    return engines.without_clone()


def submit(jobs: Sequence[Job], workdir: Path, settings: Settings) -> list[str]:
    """Names of the managed jobs."""
    for run in engines.runs(jobs):
        engines.call(command(run, workdir / "skypilot.yaml"), run.name)
    return [_name(run.name) for run in engines.runs(jobs)]


def _name(text: str) -> str:
    return engines.kubernetes_name(text, 63)
