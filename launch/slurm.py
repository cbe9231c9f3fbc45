"""SLURM: one array over the runs, through submitit; and the same array as a batch script.

A run that is about to be pre-empted or to reach its time limit saves a checkpoint, and its array element is
queued again.
"""

import dataclasses
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm import commands, untrusted
from hybridlm.errors import ConfigError, RunError
from hybridlm.fields import Positive
from launch import engines, local

PLAIN = re.compile(r"[\w./+@:,=-]+", re.ASCII)  # paths that submitit's script can hold
LOG_LINE = 'exec >> "$workdir/slurm_${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}.log" 2>&1\n'
SIGNAL_SECONDS = 300  # before the time limit, for the checkpoint


@dataclasses.dataclass(frozen=True)
class Settings:
    """nodes, gpus: of one run, gpus a node; there is a process on each GPU.  cpus: of one process.
    minutes: until a run is stopped and queued again.  parallel: runs at the same time.
    partition, account, qos, constraint: as the cluster calls them.
    cluster: "slurm", or "local" for submitit's own executor on this machine.
    """

    nodes: Positive = 1
    gpus: Positive = 8
    cpus: Positive = 8
    minutes: Positive = 1440
    parallel: Positive = 8
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    cluster: str = "slurm"


class Task:
    """What submitit pickles: trains the runs in ``folders`` in a process of its own, and requeues itself."""

    def __init__(self, distributed: bool):
        self.distributed = distributed
        self.process: subprocess.Popen | None = None

    def __call__(self, folders: list[str]) -> int:
        flags = ["--distributed"] if self.distributed else []
        self.process = subprocess.Popen([*local.WORKER, *flags, "--", *folders])
        return self.process.wait()

    def checkpoint(self, folders: list[str]) -> Any:
        """submitit calls this ahead of pre-emption and time-out; what it returns is queued again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        return DelayedSubmission(Task(self.distributed), folders)


def write(jobs: Sequence[local.Job], workdir: Path, settings: Settings) -> list[Path]:
    """slurm.sh, for `sbatch`, and slurm_runs.txt, a line for each element of its array: names of runs.

    sbatch reads its own lines by rules of its own: a workdir that is not PLAIN stands in none of them.
    """
    simple = PLAIN.fullmatch(str(workdir))
    lines = "".join(" ".join(run.name for run in job.runs) + "\n" for job in jobs)
    runs = engines.write(workdir / "slurm_runs.txt", lines)
    flags = {
        "job-name": engines.plain(workdir.name),
        "array": f"0-{len(jobs) - 1}%{settings.parallel}",
        "nodes": settings.nodes,
        "ntasks-per-node": settings.gpus,
        "gpus-per-node": settings.gpus,
        "cpus-per-task": settings.cpus,
        "time": settings.minutes,
        "signal": f"USR1@{SIGNAL_SECONDS}",
        "open-mode": "append",
        **({"output": workdir / "slurm_%A_%a.log"} if simple else {}),
        **_chosen(settings),
    }
    head = "".join(f"#SBATCH --{name}={value}\n" for name, value in flags.items())
    distributed = " --distributed" if settings.nodes * settings.gpus > 1 else ""
    script = (
        f"#!/bin/bash\n{head}#SBATCH --requeue\n\n"
        f"export PYTHONPATH={untrusted.shell([commands.root()])}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        f"workdir={untrusted.shell([workdir])}\n"
        f"{'' if simple else LOG_LINE}"
        'mapfile -t runs < "$workdir/slurm_runs.txt"\n'
        "folders=()\n"
        'for run in ${runs[$SLURM_ARRAY_TASK_ID]}; do folders+=("$workdir/$run"); done\n'
        f'srun python -m launch.worker{distributed} -- "${{folders[@]}}"\ncode=$?\n'
        "# 3: stopped ahead of the time limit, with a checkpoint\n"
        '[ $code = 3 ] && exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"\nexit $code\n'
    )
    return [engines.write(workdir / "slurm.sh", script, executable=True), runs]


def _chosen(settings: Settings) -> dict[str, str]:
    """What the cluster calls by name; ConfigError for a value that sbatch would read as several words."""
    chosen = {name: getattr(settings, name) for name in ("partition", "account", "qos", "constraint")}
    for name, value in chosen.items():
        if re.search(r"[\s#'\"\\]|[^ -~]", value):
            raise ConfigError(f"--engine {name}", value, "must be one word, without quotes, # and backslash")
    return {name: value for name, value in chosen.items() if value}


def missing(settings: Settings) -> str:
    """Why nothing can be submitted from here; "" if it can."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "submitit is not installed (pip install -e '.[launch]')"
    there = settings.cluster == "local" or shutil.which("sbatch")
    return "" if there else "there is no sbatch on this machine"


def submit(jobs: Sequence[local.Job], workdir: Path, settings: Settings) -> list[str]:
    """Ids of the array's elements."""
    import submitit

    if not PLAIN.fullmatch(str(workdir)):
        fix = f"Start {workdir / 'slurm.sh'} with sbatch, or give another --workdir."
        raise ConfigError("--workdir", str(workdir), "cannot stand in the script that submitit writes", fix)
    executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=settings.cluster)
    executor.update_parameters(
        name=engines.plain(workdir.name),
        nodes=settings.nodes,
        tasks_per_node=settings.gpus,
        cpus_per_task=settings.cpus,
        gpus_per_node=settings.gpus,
        timeout_min=settings.minutes,
        slurm_array_parallelism=settings.parallel,
        slurm_signal_delay_s=SIGNAL_SECONDS,
        **{f"slurm_{name}": value for name, value in _chosen(settings).items()},
    )
    task = Task(distributed=settings.nodes * settings.gpus > 1)
    try:
        found = executor.map_array(task, [list(map(str, job.folders)) for job in jobs])
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise RunError(f"sbatch refused the sweep: {error}") from error
    return [job.job_id for job in found]
