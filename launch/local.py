"""The local engine: a queue of worker processes over these devices; `launch.state` says how they are."""

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from hybridlm import cost, untrusted
from hybridlm.fields import Count, NonNegative
from hybridlm.run import private
from hybridlm.trainer import alike
from launch.grid import Run
from launch.state import ERROR, LOG, last_line, status

log = logging.getLogger("hybridlm")

WORKER = [sys.executable, "-m", "launch.worker"]
POLL_SECONDS = 0.5
STOPPED = 3  # exit code of a worker that was asked to stop and saved a checkpoint
LOG_SECONDS = 5  # for the last lines of a process that has ended
GRACE_SECONDS = 30  # for a stopped run to save its checkpoint
CONTEXT_BYTES = 1 << 30  # that a process takes on a GPU before it computes anything
MOST_JOBS = 8  # processes on one device, if its memory and the CPU cores allow


@dataclasses.dataclass(frozen=True)
class Settings:
    """jobs: processes on each device; 0 is as many as fit, at most MOST_JOBS.
    seconds: after which the sweep stops what runs and reports what there is; 0 sets no limit.
    """

    jobs: Count = 0
    seconds: NonNegative = 0.0


class Device(NamedTuple):
    """gpu: index of an NVIDIA GPU, None for whatever else JAX finds.  memory: bytes, None if not known."""

    gpu: int | None
    memory: int | None


def devices() -> list[Device]:
    """NVIDIA GPUs (those of CUDA_VISIBLE_DEVICES if set), else one device for everything."""
    query = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    if not shutil.which(query[0]) or os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return [Device(None, None)]
    out = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    listed = re.findall(r"^(\d+), (.+)$", out, re.MULTILINE)  # without a driver it says so, also there
    found = [Device(int(i), int(mib) << 20 if mib.isdecimal() else None) for i, mib in listed]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = [device for device in found if str(device.gpu) in visible.split(",")]
    return found or [Device(None, None)]


class Job:
    """Runs that one process trains, and the process."""

    def __init__(self, runs: Sequence[Run], workdir: Path):
        self.runs, self.folders = list(runs), [workdir / run.name for run in runs]
        self.process: subprocess.Popen | None = None

    def start(self, device: Device, per_device: int) -> None:
        environment = dict(os.environ)
        if device.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device.gpu)
            if per_device > 1:
                environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / per_device:.2f}")
        for folder in self.folders:
            (folder / ERROR).unlink(missing_ok=True)
        command = [*WORKER, "--die_with_parent", f"--sharing={per_device}", "--", *map(str, self.folders)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        self.log = threading.Thread(target=self._keep_log, args=(self.process.stdout,), daemon=True)
        self.log.start()

    def _keep_log(self, said: IO[bytes]) -> None:
        """Until the process ends: what it says goes to log.txt, without the user's name and home."""
        path = self.folders[0] / LOG
        for line in said:
            with contextlib.suppress(OSError), path.open("ab") as out:
                out.write(private.hide(line.decode(errors="replace")).encode())

    def poll(self) -> bool:
        """Whether the process has ended; a run that it left without a result gets its error.txt."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        self.log.join(LOG_SECONDS)
        if code == STOPPED:
            return True
        for run, folder in zip(self.runs, self.folders, strict=True):
            if status(folder, run.config.train.steps).state == "queued":
                why = self._why(code, run.config.train.steps)
                try:
                    untrusted.write_text(folder / ERROR, why + "\n")
                except OSError as error:  # the others go on
                    log.error("%s: %s (%s cannot be written: %s)", run.name, why, ERROR, error.strerror)
        return True

    def _why(self, code: int, steps: int) -> str:
        """A run that ended by ``code`` has no result."""
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if code == 0:
            why = f"ended without a sealed checkpoint and a line of metrics at step {steps}"
        return ": ".join(filter(None, [why, last_line(self.folders[0], LOG)]))

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self.log.join(LOG_SECONDS)


def jobs(runs: Sequence[Run], workdir: Path, vmap: bool) -> list[Job]:
    """Runs as they are trained: one a process, or with ``vmap`` all those that are alike together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        together = vmap and run.config.log.wandb_mode == "disabled"  # W&B tracks one run a process
        groups.setdefault(alike(run.config) if together else run.name, []).append(run)
    return [Job(group, workdir) for group in groups.values()]


def fitting(jobs: Sequence[Job], found: Sequence[Device]) -> int:
    """How many of ``jobs`` run on one device at once: what memory and CPU cores allow, at most MOST_JOBS."""
    cores = os.cpu_count() or 1
    if found[0].memory is None:
        return min(MOST_JOBS, cores)
    alone = {"data": 1, "fsdp": 1, "tensor": 1}
    need = [sum(sum(cost.memory(run.config, alone)) for run in job.runs) for job in jobs]
    fits = int(0.8 * found[0].memory / (CONTEXT_BYTES + 1.5 * max(need, default=0)))
    return max(1, min(MOST_JOBS, fits, 2 * cores // len(found)))


def run_all(
    waiting: list[Job],
    found: Sequence[Device],
    per_device: int,
    show: Callable[[list[Job], list[Job]], None],
    seconds: float = float("inf"),
) -> None:
    """Starts jobs as places come free until none waits, or ``seconds`` are over; then stops what runs.

    show: called every POLL_SECONDS with the running and the waiting jobs.
    """
    per_device = min(per_device, max(1, -(-len(waiting) // len(found))))
    free = [device for _ in range(per_device) for device in found]
    running: list[tuple[Job, Device]] = []
    waiting, began = list(waiting), time.monotonic()
    try:
        while running or waiting:
            for job, device in list(running):
                if job.poll():
                    running.remove((job, device))
                    free.append(device)
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                job.start(device, per_device)
                running.append((job, device))
            show([job for job, _ in running], waiting)
            if time.monotonic() - began > seconds:
                break
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for job, _ in running:
            job.stop()
