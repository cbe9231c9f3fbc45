"""Runs the measurements and tests of the docs that need a GPU, as far as the time goes.

    python -m benchmarks.acceptance --output results --seconds 900 [--cards 0,1] [--only tests,kernels_kda]
        [--jobs 4] [--retry] [--list]

The jobs are in acceptance_jobs.py. What one says goes to OUTPUT/NAME.log as it comes. One that ended by
itself is a line of OUTPUT/done.jsonl: seconds, exit code, commit, card, jax, load, and what ran beside it.
The same call again, on another machine if need be, goes on with the jobs that have no line there; those that
failed run again with --retry, and lines of another commit are refused. A job that was cut runs anew.

A job that times something has its card alone. Others (tests, compilation ahead, errors) share cards that
nothing is timed on, at low priority. All together start at most --jobs processes that compile, by default a
quarter of the cores: each has threads of its own, and with more of them nothing gets timed. `{jobs}` of a
command is a card's part of them. Jobs begin in the order of the list, each as soon as it may; none overtakes
one that waits for a card or for processes. One that should not end in time is not begun. When the time is
over, or on SIGTERM, SIGINT or SIGHUP, the process groups of all that run are ended; so is a job at three
times its seconds, as failed.

Steps that were compiled ahead find their programs in OUTPUT/programs: their first_step_s is not that of a
first step, and what XLA tried for them it may have tried beside other work (`beside` in compile_NAME's line).
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.acceptance_jobs import JOBS, ROOT, Job

POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # less than whoever ends this process may give it
OVERRUN = 3  # times the seconds of a job


class Running(NamedTuple):
    job: Job
    card: str
    process: subprocess.Popen
    began: float
    beside: set[str]  # names of jobs that ran while it did


def share(jobs: int, cards: Sequence[str]) -> int:
    """Processes of a job that takes ``{jobs}`` of them."""
    return max(1, jobs // len(cards))


def choose(
    waiting: Sequence[Job], running: Sequence[tuple[Job, str]], cards: Sequence[str], jobs: int
) -> tuple[Job, str] | None:
    """The job that may begin now, and its card; None while the first waits for a card or for processes."""
    unfinished = {job.name for job in waiting} | {job.name for job, _ in running}
    first = next((job for job in waiting if job.after not in unfinished), None)
    if first is None:
        return None
    together = [first, *(job for job, _ in running)]
    each = share(jobs, cards)
    if running and sum(each if "{jobs}" in job.command else 1 for job in together) > jobs:
        return None
    on = {card: [job for job, at in running if at == card] for card in cards}
    free = [card for card in cards if not on[card]]
    if not first.timed:  # cards are left to what is timed while these fit on one
        free = [card for card in cards if on[card] and not any(job.timed for job in on[card])] + free
    return (first, free[0]) if free else None


class Queue:
    """Runs jobs on ``cards``, at most ``jobs`` processes of them, until ``seconds`` are over."""

    def __init__(
        self, output: Path, cards: Sequence[str], jobs: int, seconds: float, failed: Collection[str] = ()
    ):
        self.output, self.cards, self.jobs = output.resolve(), cards, jobs
        self.end = time.monotonic() + seconds - GRACE_SECONDS
        self.running: list[Running] = []
        self.gone = set(failed)  # names of jobs that failed, or for which there was no time
        self.stopped = False

    def run(self, jobs: Sequence[Job]) -> None:
        waiting = list(jobs)
        try:
            while (waiting or self.running) and not self.stopped and self.left() > 0:
                for one in list(self.running):
                    self._look(one)
                for job in list(waiting):
                    if job.after in self.gone:
                        why = f"{job.after} failed, or was not begun"
                    elif job.seconds > self.left():
                        why = f"it takes {job.seconds:.0f} s and {self.left():.0f} are left"
                    else:
                        continue
                    waiting.remove(job)
                    self.gone.add(job.name)
                    say(f"{job.name}: not begun, {why}")
                while found := choose(waiting, [one[:2] for one in self.running], self.cards, self.jobs):
                    waiting.remove(found[0])
                    self._begin(*found)
                if self.running:
                    time.sleep(POLL_SECONDS)
        finally:
            for one in self.running:
                say(f"{one.job.name}: cut after {time.monotonic() - one.began:.0f} s")
            end([one.process for one in self.running])

    def left(self) -> float:
        return self.end - time.monotonic()

    def stop(self, *_: object) -> None:
        """A signal's: ``run`` ends what runs, and returns."""
        self.stopped = True

    def _command(self, job: Job, output: str) -> str:
        each = share(self.jobs, self.cards)
        return f"python {job.command}".format(jobs=each, output=shlex.quote(output))

    def _begin(self, job: Job, card: str) -> None:
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        environment |= {"CUDA_VISIBLE_DEVICES": card, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        if not job.timed:  # others may be on the card
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        for name, value in job.environment.items():
            environment[name] = value.format(output=self.output)
        command = self._command(job, str(self.output))
        with (self.output / f"{job.name}.log").open("ab") as log:
            log.write(f"$ {command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        beside = {one.job.name for one in self.running}
        for one in self.running:
            one.beside.add(job.name)
        self.running.append(Running(job, card, process, time.monotonic(), beside))
        if not job.timed:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PGRP, process.pid, 10)
        say(f"{job.name}: begun on card {card}")

    def _look(self, one: Running) -> None:
        """Notes that it has ended, or ends it if it takes too long."""
        seconds = time.monotonic() - one.began
        if one.process.poll() is None and seconds < OVERRUN * one.job.seconds:
            return
        end([one.process])  # and what it may have left behind
        self.running.remove(one)
        row = {
            "name": one.job.name, "rc": one.process.returncode, "seconds": round(seconds, 1),
            "load": round(os.getloadavg()[0], 1), "beside": sorted(one.beside), "card": one.card,
            **about(one.card), "shows": one.job.shows, "command": self._command(one.job, "OUTPUT"),
        }  # fmt: skip
        with (self.output / "done.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["rc"]:
            self.gone.add(one.job.name)
        say(f"{one.job.name}: exit code {row['rc']} after {seconds:.0f} s")


def end(started: Sequence[subprocess.Popen]) -> None:
    """Ends process groups: asked first, killed after GRACE_SECONDS."""
    for process in started:
        signalled(process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        signalled(process.pid, signal.SIGKILL)
        process.wait()


def signalled(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def commit() -> str:
    """Of this checkout, with "-dirty" where files of it were changed; "" where it has no history."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def about(card: str) -> dict[str, str]:
    """What a job ran on."""
    device = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--id={card}", "--query-gpu=name", "--format=csv,noheader"]
        device = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": device, "jax": importlib.metadata.version("jax"), "date": today, "commit": commit()}


def done(output: Path) -> dict[str, int]:
    """Exit codes of the jobs that have a line, the last of each. Raises ValueError for another commit's."""
    path = output / "done.jsonl"
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n") and text:  # a line that was cut
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    here = commit()
    if others := {row["commit"] for row in rows} - {here}:
        raise ValueError(f"{path} is of commit {others.pop()}, this is {here}: give another --output")
    return {row["name"]: row["rc"] for row in rows}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.0f}: {text}", flush=True)


def named(words: str) -> list[Job]:
    """For argparse: jobs that are named, or whose names begin so."""
    begins = lambda job, word: f"{job.name}_".startswith(f"{word}_")
    if unknown := [word for word in words.split(",") if not any(begins(job, word) for job in JOBS)]:
        known = ", ".join(job.name for job in JOBS)
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known, or how they begin: {known}")
    return [job for job in JOBS if any(begins(job, word) for word in words.split(","))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if all jobs that were asked for are done, and none failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, quarter = parser.add_argument, max(1, (os.cpu_count() or 4) // 4)
    add("--output", type=Path, default=Path("results"), help="folder of logs and done.jsonl")
    add("--cards", type=lambda text: text.split(","), help="indices of GPUs; all that are here")
    add("--seconds", type=float, default=900, help="after which all has ended")
    add("--only", type=named, default=JOBS, help="names of jobs, or how they begin, with commas")
    add("--jobs", type=int, default=quarter, help="processes in all; a quarter of the cores")
    add("--retry", action="store_true", help="jobs that failed, too")
    add("--list", action="store_true", help="says which jobs there are, and runs none")
    args = parser.parse_args(arguments)
    if args.jobs < 1 or args.seconds <= GRACE_SECONDS:
        parser.error(f"--jobs={args.jobs} --seconds={args.seconds}: at least 1, and above {GRACE_SECONDS}")
    try:
        codes = done(args.output)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for job in args.only:
            state = f"exit code {codes[job.name]}" if job.name in codes else f"{job.seconds:.0f} s"
            kind = "alone" if job.timed else "beside"
            print(f"{job.name:26} {state:12} {kind:6} {job.shows:30} python {job.command}")
        return 0
    if args.cards is None:
        from launch import local

        args.cards = [str(device.gpu) for device in local.devices() if device.gpu is not None]
        if not args.cards:
            parser.error("no NVIDIA GPU is here; --cards=0 goes on all the same")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = [name for name, code in codes.items() if code and not args.retry]
    queue = Queue(args.output, args.cards, args.jobs, args.seconds, failed)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, queue.stop)
    queue.run([job for job in args.only if job.name not in codes or (args.retry and codes[job.name])])
    codes = done(args.output)
    failed = [job.name for job in args.only if codes.get(job.name)]
    missing = [job.name for job in args.only if job.name not in codes]
    say(f"failed: {', '.join(failed) or 'none'}; left: {', '.join(missing) or 'none'}")
    return int(bool(failed or missing))


if __name__ == "__main__":
    sys.exit(main())
