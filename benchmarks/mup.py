"""Whether the best learning rate carries over widths: the quickstart's data and layers, with muP and without.

    python -m benchmarks.mup --widths 256 512 1024 --base 256 --steps 300

Writes a Markdown table of held-out losses, a row a width and a column a rate, the best of each row in bold.
All rates of a width are trained in one program, compiled once, on the same batches. At the base width the two
parametrisations are one.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.config import Config


def config(width: int, base: int, rate: float, given: argparse.Namespace) -> Config:
    fields = {
        "model.d_model": width, "model.mup_base_width": base, "optimizer.name": given.optimizer,
        "optimizer.learning_rate": rate, "optimizer.warmup_steps": max(1, given.steps // 8),
        "train.steps": given.steps, "train.batch_size": given.batch_size, "train.seq_len": given.seq_len,
        "checkpoint.every_steps": 0, "eval.every_steps": 0, "eval.batches": given.eval_batches,
        "eval.sample_tokens": 0, "log.every_steps": given.steps,
    }  # fmt: skip
    return configs.resolve(configs.load("configs/quickstart.py", {n: str(v) for n, v in fields.items()}))


def losses(width: int, base: int, given: argparse.Namespace) -> list[float]:
    """Held-out nats per token at each rate; NaN for a run that failed."""
    chosen = [config(width, base, rate, given) for rate in given.rates]
    with tempfile.TemporaryDirectory() as folder:
        members = trainer.together(chosen, [Path(folder) / str(index) for index in range(len(chosen))])
    return [math.nan if one.failed else one.metrics["val_loss"] for one in members]


def row(name: str, values: list[float]) -> str:
    best = min((value for value in values if not math.isnan(value)), default=None)
    cells = [f"**{value:.3f}**" if value == best else f"{value:.3f}" for value in values]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**-n for n in range(11, 4, -1)])
    parser.add_argument("--base", type=int, default=256, help="model.mup_base_width of the second half")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--eval_batches", type=int, default=32)
    parser.add_argument("--only", choices=["standard", "mup"], help="one half of the table")
    parser.add_argument("--optimizer", default="adamw")
    given = parser.parse_args()
    table = ["| parametrisation, width | " + " | ".join(f"{rate:.2g}" for rate in given.rates) + " |"]
    table.append("|---" * (len(given.rates) + 1) + "|")
    halves = {"standard": (0, "standard"), "mup": (given.base, f"muP from {given.base}")}
    for base, name in [halves[given.only]] if given.only else halves.values():
        for width in given.widths:
            if base == width and not given.only:
                continue  # the same as without
            began = time.perf_counter()
            table.append(row(f"{name}, {width}", losses(width, base, given)))
            print(f"{table[-1]}  ({time.perf_counter() - began:.0f} s)", flush=True)
    print("\n".join(table))


if __name__ == "__main__":
    main()
