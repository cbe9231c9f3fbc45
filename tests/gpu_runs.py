"""Real runs on the GPUs of one host, for docs/scaling.md: resumed on fewer, one process of several killed.

    python -m tests.gpu_runs --gpus=4 [--steps=30] [--parts=resumed,killed]

A small hybrid (`configs/quickstart.py`) on text, in float32. First one process on all GPUs, fsdp, resumed
from its checkpoint on fewer; then a process a GPU, one of which is killed while NCCL is under way: how long
the others take to end and what they say, and the run resumed by all.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from tests import process_runs, tiny

SAVED = 10  # steps between checkpoints
KILLED_AFTER = 14  # lines of metrics
BETWEEN = 0.3  # of a second after that: in a step


def arguments(workdir: Path, steps: int, fsdp: int) -> list[str]:
    settings = {
        "mesh.data": 1, "mesh.fsdp": fsdp, "train.steps": steps, "train.batch_size": 8, "train.seq_len": 1024,
        "optimizer.name": "adamw", "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 5,
        "checkpoint.every_steps": SAVED, "checkpoint.keep_last": 9, "eval.every_steps": 0, "eval.batches": 2,
        "eval.sample_tokens": 0, "log.every_steps": 1,
    }  # fmt: skip
    given = [f"--config.{field}={value}" for field, value in settings.items()]
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *given]


def run(workdir: Path, steps: int, gpus: int, logs: Path) -> list[float]:
    """Losses by step of a run, or of what is left of it, of one process on the first so many GPUs."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    [code] = process_runs.finish(
        process_runs.start(1, arguments(workdir, steps, gpus), logs, more=visible, gpus=True)
    )
    assert code == 0, (logs / "0").read_text()[-2000:]
    return [line["loss"] for line in tiny.lines(workdir)]


def worst(losses: list[float], whole: list[float], first: int = 0) -> str:
    pairs = list(zip(losses, whole, strict=True))[first:]
    return f"{max(abs(a - b) / b for a, b in pairs):.1e}"


def resumed(folder: Path, steps: int, gpus: int, whole: list[float]) -> None:
    """Prints a row for each smaller number of GPUs that goes on from the first checkpoint."""
    print(
        "| GPUs | from step | on GPUs | steps | largest difference of losses |\n|---|---|---|---|---|",
        flush=True,
    )
    for count in [gpus, *(n for n in (4, 2, 1) if n < gpus)]:
        workdir = folder / f"on{count}"
        shutil.copytree(folder / "whole", workdir)
        for step in range(SAVED + 1, steps + 1):
            shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
        losses = run(workdir, steps, count, folder / "logs")
        print(f"| {gpus} | {SAVED} | {count} | {len(losses)} | {worst(losses, whole, SAVED)} |", flush=True)


def killed(folder: Path, steps: int, gpus: int, whole: list[float]) -> None:
    """Prints a row for the last and the first of ``gpus`` processes that is killed."""
    print("\n| processes | killed | all ended after | exit codes | who says so | then | steps | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for victim in (gpus - 1, 0):
        workdir, logs = folder / f"killed{victim}", folder / f"logs{victim}"
        given = arguments(workdir, steps, gpus)
        running = process_runs.start(gpus, given, logs, gpus=True)
        process_runs.await_lines(workdir, KILLED_AFTER, running)
        time.sleep(BETWEEN)
        running[victim].kill()
        began = time.monotonic()
        codes = process_runs.finish(running, 60)
        seconds = time.monotonic() - began
        others = [index for index in range(gpus) if index != victim]
        text = {index: (logs / str(index)).read_text() for index in others}
        naming = sum(f"process {victim}" in said and "ended without a word" in said for said in text.values())
        for index in others:
            print(f"process {index}: {text[index].strip().splitlines()[-1][:200]}")
        assert process_runs.finish(process_runs.start(gpus, given, logs, gpus=True)) == [0] * gpus
        losses = [line["loss"] for line in tiny.lines(workdir)]
        print(
            f"| {gpus} | {victim} | {seconds:.1f} s | {codes} | {naming} of {len(others)} | {gpus} "
            f"| {len(losses)} | {worst(losses, whole)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--parts", default="resumed,killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = run(folder / "whole", args.steps, args.gpus, folder / "logs")
        for part in args.parts.split(","):
            {"resumed": resumed, "killed": killed}[part](folder, args.steps, args.gpus, whole)


if __name__ == "__main__":
    main()
