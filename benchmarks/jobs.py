"""Measurements in processes of their own: all compile side by side, then each is timed alone."""

import concurrent.futures
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READY = "ready"  # what a job says when it has compiled
WAITING = 4  # jobs that are ready while another is timed: each holds a context on every GPU
# Of who is timed on these GPUs.
LOCK = Path(tempfile.gettempdir()) / f"hybridlm-timed-{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}.lock"
Row = dict[str, Any]


def run(
    commands: Mapping[str, Sequence[str]], jobs: int, stages: Sequence[bool], waiting: int = WAITING
) -> dict[str, Row]:
    """What each command, arguments of Python's, says in a line of JSON after `wait`, by name; printed too.

    jobs: at a time that compile, into a cache that they share.
    waiting: jobs that are there while one is timed, that one among them. With 1 it may take the devices'
        memory at once, as XLA does by itself; else all take it as they need it.
    stages: False: all compile; True: each is timed alone, the others waiting with nothing on the devices
        (those of other runs of this too).
    """
    with tempfile.TemporaryDirectory() as cache:
        env = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | env

        def job(name: str, timed: bool) -> Row:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            its = env if timed and waiting == 1 else shared
            process = subprocess.Popen([sys.executable, *commands[name]], env=its, **pipes)
            assert process.stdout
            said = process.stdout.readline()
            if said.strip() == READY and timed:
                with LOCK.open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    said = process.communicate("go\n")[0]
            else:
                process.communicate()
            if not timed:
                return {}
            row = json.loads(said) if said.startswith("{") else {"error": f"ended: {process.returncode}"}
            print(json.dumps({"name": name} | row), flush=True)
            return row

        for timed in stages:
            with concurrent.futures.ThreadPoolExecutor(min(jobs, waiting) if timed else jobs) as pool:
                rows = list(pool.map(lambda name, timed=timed: job(name, timed), commands))
    return dict(zip(commands, rows, strict=True))


def wait() -> None:
    """Of a job: says that it has compiled, and ends unless it is to be timed."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        sys.exit()
