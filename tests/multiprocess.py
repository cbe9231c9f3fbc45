"""Runs train.py as several real processes on this machine (CPU, gloo), for tests and for docs/trust.md.

python -m tests.multiprocess        prints the table of docs/trust.md
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hybridlm import config as configs
from tests import tiny

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(count: int, arguments: Sequence[str], logs: Path, devices: int = 1) -> list[subprocess.Popen]:
    """``count`` processes of one run; standard error of each goes to logs/<index>."""
    logs.mkdir(exist_ok=True)
    address = f"localhost:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = []
    for index in range(count):
        distributed = [f"--distributed={address},{count},{index}"] if count > 1 else []
        with (logs / str(index)).open("w") as log:
            command = [sys.executable, "train.py", *arguments, *distributed]
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def finish(running: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    """Exit codes; whatever still runs after ``seconds`` is killed."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def await_lines(workdir: Path, count: int, running: list[subprocess.Popen], seconds: float = 200) -> None:
    """Returns when metrics.jsonl has ``count`` lines."""
    deadline = time.monotonic() + seconds
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in running), "ended before it could be killed"
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.002)


def arguments(folder: Path, workdir: Path, **fields: object) -> list[str]:
    """train.py's, for a tiny run on the text in ``folder``; fields as for `tiny.config`."""
    path = folder / "given.json"
    path.write_text(configs.to_json(configs.resolve(tiny.config(f"{folder}/*.txt", **fields))))
    return [f"--config={path}", f"--workdir={workdir}"]
