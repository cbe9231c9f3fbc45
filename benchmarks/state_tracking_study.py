"""State tracking with and without negative eigenvalues: learning rates and seeds at once, in one program.

    python -m benchmarks.state_tracking_study --groups=parity,S3 --seconds=30

Word problems of `hybridlm.data.state_tracking`: trained on 100k words of 128 elements, a label at every one;
tested on 512. Parity needs an eigenvalue of -1 (arXiv 2411.12537), and S3 in one layer two Householder steps
a token with them (arXiv 2502.10297), so one layer of these mixers should fail on S3 either way. Width 128,
four heads, SwiGLU of 256.
"""

import argparse
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import vmapped
from hybridlm.data import state_tracking
from hybridlm.data.source import View

HEADS = {"num_heads": 4, "head_dim": 32}
STUDY: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", HEADS),
    "gla": ("gla", {**HEADS, "conv_size": 4}),
    "deltanet": ("delta_net", HEADS),
    "deltanet, negative": ("delta_net", {**HEADS, "neg_eigval": True}),
    "gdn": ("gated_delta_net", HEADS),
    "gdn, negative": ("gated_delta_net", {**HEADS, "neg_eigval": True}),
    "kda": ("kda", HEADS),
    "kda, negative": ("kda", {**HEADS, "neg_eigval": True}),
}


def rows(group: str, count: int, length: int, split: str) -> tuple[dict, int]:
    """``group`` is a group's name; "S3-swaps" draws from its exchanges of two points alone."""
    name, _, only = group.partition("-")
    config = state_tracking.Config(
        group=name, only_swaps=only == "swaps", train_examples=count, val_examples=count
    )
    source = state_tracking.open_source(config, View(split, length, 0, 128))
    return source.rows(np.arange(count)), length


class Case(NamedTuple):
    group: str
    layers: int
    name: str


@functools.cache
def data(group: str, examples: int, test_examples: int) -> tuple[vmapped.Data, vmapped.Data]:
    """(words of 128 to train on, words of 512 to test on)."""
    train, test = rows(group, examples, 128, "train"), rows(group, test_examples, 512, "val")
    return vmapped.data([train]), vmapped.data([test])


def test_rows(flags: argparse.Namespace) -> int:
    return min(64, flags.test_examples)


def prepare(case: Case, flags: argparse.Namespace) -> vmapped.Runs:
    train, test = data(case.group, flags.examples, flags.test_examples)
    model = vmapped.definition([STUDY[case.name]] * case.layers, d_model=128, vocab=128, mlp_hidden=256)
    rates = [float(rate) for rate in flags.rates.split(",")]
    runs = vmapped.runs(
        vmapped.language_model(model), rates=rates, seeds=range(flags.seeds), batch_size=flags.batch_size,
        weight_decay=1e-6, steps_per_call=flags.steps_per_call,
    )  # fmt: skip
    return vmapped.compiled(runs, train, vmapped.first_rows(test, test_rows(flags)))


def study(case: Case, runs: vmapped.Runs, flags: argparse.Namespace) -> dict[str, Any]:
    train, test = data(case.group, flags.examples, flags.test_examples)
    print(f"{case.group}, {case.name}, {case.layers} layers", flush=True)
    result = vmapped.train(runs, train, steps=flags.steps, seconds=flags.seconds)
    correct = vmapped.count_correct(runs, result.params, test, test_rows(flags)).sum(axis=1)
    score = (correct / (flags.test_examples * 512)).reshape(len(runs.rates), len(runs.seeds))
    trained = result.curve[-1][1].reshape(len(runs.rates), len(runs.seeds))
    best = int(score.mean(axis=1).argmax())
    order = len(state_tracking.elements(case.group.partition("-")[0]))
    return {
        "group": case.group, "mixer": case.name, "layers": case.layers, "rate": runs.rates[best],
        "steps": result.steps, "seconds": round(result.seconds, 1), "at_128": trained[best].tolist(),
        "at_512": score[best].tolist(), "chance": 1 / order,
    }  # fmt: skip


def line(r: dict[str, Any]) -> str:
    cells = [r["group"], r["mixer"], r["layers"], f"{max(r['at_128']):.3f}"]
    cells += [f"{np.mean(r['at_512']):.3f} ({min(r['at_512']):.3f} to {max(r['at_512']):.3f})"]
    cells += [f"{r['chance']:.3f}", f"{r['rate']:g}", r["steps"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="parity,S3")
    parser.add_argument("--mixers", default=";".join(STUDY), help="separated by semicolons")
    parser.add_argument("--layers", default="1,2")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30, help="of training for each line of the table")
    parser.add_argument("--steps", type=int, default=20_000, help="at most")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--test_examples", type=int, default=512)
    parser.add_argument("--steps_per_call", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--output", default="state_tracking_study.json")
    flags = parser.parse_args()
    print(f"{jax.devices()[0]}, {time.strftime('%F')}")
    header = "| group | mixer | layers | trained, 128 | 512, mean (min to max) | guessing | rate | steps |"
    mixers = [name.strip() for name in flags.mixers.split(";")]
    cases = [
        Case(group, layers, name)
        for group in flags.groups.split(",")
        for layers in map(int, flags.layers.split(","))
        for name in mixers
    ]
    for group in flags.groups.split(","):
        data(group, flags.examples, flags.test_examples)  # once, not in every thread
    results = []
    with ThreadPoolExecutor(flags.threads) as pool:
        ready = {case: pool.submit(prepare, case, flags) for case in cases}
        for case in cases:
            results.append(study(case, ready[case].result(), flags))
            Path(flags.output).write_text(json.dumps(results, indent=1))
            print(line(results[-1]), flush=True)
    print("\n".join([header, "|" + "---|" * 8, *map(line, results)]))


if __name__ == "__main__":
    main()
