"""A sweep's folder with known numbers, for tests of what reads one."""

import json
from pathlib import Path

from hybridlm.run import seal

LAYERS = {"pure": [], "3:1": [3], "1:1": [1, 3]}


def write(workdir: Path, text: bool = False) -> None:
    """Two mixers at three ratios and two seeds, attention alone, one placement, one failed run."""
    runs = []
    for mixer, best in (("gla", 0.5), ("kda", 0.7)):
        for ratio, full in LAYERS.items():
            for seed in (0, 1):
                value = min(1.0, best + 0.2 * len(full)) + 0.01 * seed
                runs.append(
                    run(
                        workdir,
                        f"{mixer}_{ratio}_{seed}",
                        {"mixer": mixer, "ratio": ratio, "seed": str(seed)},
                        full,
                        value,
                        text,
                    )
                )
    runs.append(
        run(workdir, "full", {"mixer": "full", "ratio": "full", "seed": "0"}, [0, 1, 2, 3], 0.95, text)
    )
    runs.append(
        run(
            workdir, "placed", {"mixer": "kda", "ratio": "3:1", "placement": "0", "seed": "0"}, [0], 0.6, text
        )
    )
    runs.append(run(workdir, "bad", {"mixer": "gla", "ratio": "pure", "seed": "2"}, [], None, text))
    (workdir / "bad" / "error.txt").write_text("RunError: <the loss> is nan\n")
    (workdir / "sweep.json").write_text(json.dumps({"command": "python -m launch.sweep", "runs": runs}))


def seal_run(folder: Path, step: int = 20) -> None:
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "array").write_text("weights")
    seal.write(folder / "checkpoints" / str(step))


def change(workdir: Path, name: str, **fields: object) -> None:
    """``fields`` in every line of a run's metrics.jsonl."""
    path = workdir / name / "metrics.jsonl"
    lines = [json.loads(line) | fields for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(workdir: Path, name: str, point: dict, full: list[int], value: float | None, text: bool) -> dict:
    (workdir / name).mkdir(parents=True)
    lines = [] if value is None else [{"step": 5, "loss": 2.0, "tokens_per_second": 1.0}]
    for step in (10, 20) if value is not None else ():
        held_out = (
            {"val_loss": 3 - value, "val_bpb": 1.0} if text else {"val_loss": 1.0, "val_accuracy": value}
        )
        speed = {"tokens_per_second": 1000.0 - 100 * len(full)}
        lines.append({"step": step, "loss": 2.0, **speed, **held_out})
    (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if value is not None:
        seal_run(workdir / name)
        start = {"date": "2026-11-25T10:00:00+00:00", "commit": "abc1234", "device": "Test device"}
        start |= {"jax": "0", "processes": 1, "together": 1}
        (workdir / name / "machine.json").write_text(json.dumps({"starts": [start]}))
    sizes = {"learning_rate": 3e-4, "width": 64, "guess": {"recall": 0.1, "loss": 2.9}}
    sizes |= {"parameters": 1000, "state_bytes": 40 - 10 * len(full), "cache_bytes": 100 * len(full)}
    return {
        "name": name,
        "point": point,
        "steps": 20,
        "num_layers": 4,
        "full_layers": full,
        "tokens": 2000,
        "flops": 1.0,
        "seq_len": 8,
        **sizes,
    }
