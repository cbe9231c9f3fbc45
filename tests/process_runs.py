"""Runs train.py as several real processes on this machine (CPU, gloo), for tests and for docs/trust.md.

python -m tests.process_runs        prints the table of docs/trust.md
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridlm import config as configs
from tests import tiny

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(
    count: int,
    arguments: Sequence[str],
    logs: Path,
    devices: int = 1,
    own: Sequence[Sequence[str]] | None = None,
    program: Sequence[str] = ("train.py",),
    absent: Sequence[int] = (),
    more: Mapping[str, str] | None = None,
    gpus: bool = False,
) -> list[subprocess.Popen]:
    """``count`` processes of one run; what each prints goes to logs/<index>.

    own: arguments of each alone.  program: what Python runs.  absent: those that are not started.
    more: of their environment.  gpus: process i has GPU i, or one process all that are visible.
    """
    logs.mkdir(exist_ok=True)
    address = f"localhost:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    cpu = {} if gpus else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment = os.environ | cpu | (more or {})
    started = []
    for index in sorted({*range(count)} - {*absent}):
        distributed = [f"--distributed={address},{count},{index}"] if count > 1 else []
        if gpus and count > 1:
            environment = environment | {"CUDA_VISIBLE_DEVICES": str(index)}
        with (logs / str(index)).open("w") as log:
            given = own[index] if own else []
            command = [sys.executable, *program, *arguments, *given, *distributed]
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


CASES = ((2, 1, 2), (2, 0, 1), (4, 2, 2), (2, 1, 4), (4, 0, 4))  # processes, the one killed, processes after
FIELDS = {
    "model__pattern": "retnet", "optimizer__learning_rate": 1e-3, "train__steps": 24,
    "checkpoint__every_steps": 5, "eval__every_steps": 7, "log__every_steps": 2,
}  # fmt: skip


def main() -> None:
    """One row a case: killed after at least 8 lines, all ended, resumed, compared with an undisturbed run."""
    print(
        "| processes | killed | all ended after | who says so | then | steps | largest difference of losses |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        tiny.write_text(folder)
        assert finish(start(1, arguments(folder, folder / "whole", **FIELDS), folder / "logs")) == [0]
        whole = tiny.lines(folder / "whole")
        for number, (before, victim, after) in enumerate(CASES):
            workdir, logs = folder / f"run{number}", folder / f"logs{number}"
            given = arguments(folder, workdir, **FIELDS)
            running = start(before, given, logs)
            await_lines(workdir, 8, running)
            running[victim].kill()
            began = time.monotonic()
            codes = finish(running, 60)
            seconds = time.monotonic() - began
            others = [index for index in range(before) if index != victim]
            assert all(codes[index] == 1 for index in others), codes
            said = f"error: process {victim}"
            naming = [index for index in others if said in (logs / str(index)).read_text()]
            assert finish(start(after, given, logs)) == [0] * after
            lines = tiny.lines(workdir)
            assert [line["step"] for line in lines] == [line["step"] for line in whole]
            worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines, whole, strict=True))
            print(
                f"| {before} | {victim} | {seconds:.1f} s | {len(naming)} of {len(others)} | {after} "
                f"| the same {len(lines)} | {worst:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
