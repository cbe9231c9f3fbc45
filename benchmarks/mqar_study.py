"""MQAR at the Based mixture for every mixer: several learning rates and seeds at once, in one program.

    python -m benchmarks.mqar_study --mixers="attention;deltanet;gdn;kda;gla;hgrn2;retnet;hybrid" --seconds=60

Two layers without MLP and a tied head, as in Zoology, at d_model 128 and 8192 ids; trained on (length, pairs)
x examples: (64, 4) x 100k, (128, 8), (256, 16), (256, 32), (256, 64) x 20k; tested on (64, 4), (64, 8), (64,
16), (128, 32), (256, 64), (512, 128), (1024, 256) x 1000; the score is the mean over these slices.
Mixers have the state sizes of the published curves. What differs from there: both layers are of the mixer,
with the linear ones' own short convolution of 4, where theirs are a BaseConv and the mixer, so that their
"attention" is nearest to "hybrid" here; slices are mixed in a batch; fewer epochs (in the table).

Prints a table and writes JSON to --output. Needs JAX, Flax, Optax and NumPy, and of the project's other
dependencies only pyarrow and tokenizers, which `hybridlm.data` imports.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import vmapped
from hybridlm import mixers
from hybridlm.data import mqar
from hybridlm.data.source import View

TRAIN = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
TEST = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]

GDN = ("gated_delta_net", {"num_heads": 1, "head_dim": 128, "v_head_dim": 256})
FULL = ("attention", {"num_heads": 2, "head_dim": 64})
ROPE_FREE = ("attention", {"num_heads": 2, "head_dim": 64, "rope_theta": 0.0})
# name -> two layers, and the published accuracy nearest in state size (Zoology's README, read off its figure)
STUDY: dict[str, tuple[list[tuple[str, dict[str, Any]]], str]] = {
    "attention": ([FULL] * 2, ""),
    "attention, RoPE then NoPE": ([FULL, ROPE_FREE], ""),
    "deltanet": ([("delta_net", {"num_heads": 1, "head_dim": 128})] * 2, ".96 (34k)"),
    "gdn": ([GDN] * 2, ".99 (66k)"),
    "kda": ([("kda", {"num_heads": 1, "head_dim": 128})] * 2, ""),
    "gla": ([("gla", {"num_heads": 1, "head_dim": 64, "v_head_dim": 128, "conv_size": 4})] * 2, ".77 (18k)"),
    "hgrn2": ([("hgrn2", {"num_heads": 1, "head_dim": 128, "conv_size": 4})] * 2, ""),
    "retnet": ([("retnet", {"num_heads": 1, "head_dim": 128, "v_head_dim": 256, "conv_size": 4})] * 2, ""),
    "hybrid": (
        [("gla", {"num_heads": 1, "head_dim": 64, "v_head_dim": 128, "conv_size": 4}), ROPE_FREE],
        "1.0 (a convolution, attention)",
    ),
}


def rows(length: int, pairs: int, examples: int, seq_len: int, vocab: int, split: str) -> tuple[dict, int]:
    """All rows of one slice, and the length of its examples."""
    sizes = {"train_examples": examples, "val_examples": examples}
    config = mqar.Config(slices=f"({length}, {pairs})", random_non_queries=False, **sizes)
    source = mqar.open_source(config, View(split, seq_len, 0, vocab))
    assert source.num_rows is not None
    return source.rows(np.arange(source.num_rows)), length


def state_elements(layers: Sequence[tuple[str, dict[str, Any]]], d_model: int) -> int:
    kinds = [(mixers.load(kind), settings) for kind, settings in layers]
    return sum(kind.cost(kind.Config(**settings), d_model).state for kind, settings in kinds)


def prepare(name: str, flags: argparse.Namespace, train: vmapped.Data, test: vmapped.Data) -> vmapped.Runs:
    model = vmapped.definition(STUDY[name][0], d_model=flags.d_model, vocab=flags.vocab, mlp_hidden=0)
    model = dataclasses.replace(model, dtype=jnp.dtype(flags.dtype))
    rates = np.logspace(*(float(x) for x in flags.log_rates.split(",")), flags.num_rates).tolist()
    runs = vmapped.runs(
        vmapped.language_model(model), rates=rates, seeds=range(flags.seeds), batch_size=flags.batch_size,
        steps_per_call=flags.steps_per_call,
    )  # fmt: skip
    return vmapped.compiled(runs, train, vmapped.first_rows(test, test_rows(test)))


def test_rows(test: vmapped.Data) -> int:
    return max(1, min(test.tokens.shape[0], 2**15 // test.tokens.shape[1]))


def study(
    name: str,
    seconds: float,
    runs: vmapped.Runs,
    flags: argparse.Namespace,
    train: vmapped.Data,
    test: vmapped.Data,
    ends: list[int],
) -> dict[str, Any]:
    """ends: where each slice of the test ends."""
    layers, published = STUDY[name]
    print(f"{name}: {len(runs.rates)} learning rates x {len(runs.seeds)} seeds", flush=True)
    say = lambda text: print(text, flush=True)
    result = vmapped.train(runs, train, steps=flags.steps, seconds=seconds, until=flags.until, say=say)
    began = time.perf_counter()
    correct_RN = vmapped.count_correct(runs, result.params, test, test_rows(test))
    labels_N = np.asarray((test.labels >= 0).sum(axis=1))
    slices = [
        correct.sum(axis=1) / labels.sum()
        for correct, labels in zip(
            np.split(correct_RN, ends[:-1], axis=1), np.split(labels_N, ends[:-1]), strict=True
        )
    ]
    slices_RS = np.stack(slices, axis=1).reshape(len(runs.rates), len(runs.seeds), -1)
    score = slices_RS.mean(axis=2)
    best = int(score.mean(axis=1).argmax())
    return {
        "mixer": name,
        "state": state_elements(layers, flags.d_model),
        "published": published,
        "rates": runs.rates,
        "best_rate": runs.rates[best],
        "score": score[best].tolist(),  # one per seed, at the best rate
        "score_by_rate": score.mean(axis=1).tolist(),
        "slices": dict(zip(map(str, TEST), slices_RS[best].mean(axis=0).tolist(), strict=False)),
        "steps": result.steps,
        "epochs": result.steps * flags.batch_size / train.tokens.shape[0],
        "seconds": round(result.seconds, 1),
        "test_seconds": round(time.perf_counter() - began, 1),
        "curve": [(step, hits.max().item()) for step, hits in result.curve],
    }


def table(results: list[dict[str, Any]]) -> str:
    slices = list(results[0]["slices"])
    lines = ["| mixer | state | score (min to max of seeds) | published | learning rate | epochs | s | "]
    lines[0] += " | ".join(slices) + " |"
    lines.append("|" + "---|" * (7 + len(slices)))
    for r in results:
        score = f"{np.mean(r['score']):.3f} ({min(r['score']):.3f} to {max(r['score']):.3f})"
        cells = [r["mixer"], f"{r['state']:,}", score, r["published"], f"{r['best_rate']:.2g}"]
        cells += [f"{r['epochs']:.1f}", f"{r['seconds']:.0f}", *(f"{v:.3f}" for v in r["slices"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mixers",
        default=";".join(STUDY),
        help="separated by semicolons; NAME=SECONDS gives one its own time",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of training for each mixer")
    parser.add_argument("--steps", type=int, default=20_000, help="at most")
    parser.add_argument(
        "--until", type=float, default=2.0, help="training accuracy of all seeds of a rate that ends it early"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="rows of 256 tokens")
    parser.add_argument("--log_rates", default="-3,-1.5", help="learning rates: 10^a to 10^b")
    parser.add_argument("--num_rates", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", help="of activations; parameters are float32")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training and test examples")
    parser.add_argument("--max_test_length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--steps_per_call", type=int, default=200)
    parser.add_argument("--output", default="mqar_study.json")
    flags = parser.parse_args()
    began = time.perf_counter()
    scaled = lambda count: max(8, int(count * flags.scale))
    train = vmapped.data(
        [rows(length, pairs, scaled(count), 256, flags.vocab, "train") for length, pairs, count in TRAIN]
    )
    width = min(flags.max_test_length, max(length for length, _ in TEST))
    shown = [(length, pairs) for length, pairs in TEST if length <= width]
    tests = [rows(length, pairs, scaled(1000), width, flags.vocab, "val") for length, pairs in shown]
    test, ends = vmapped.data(tests), np.cumsum([len(part["tokens"]) for part, _ in tests]).tolist()
    print(f"data: {train.tokens.shape[0]:,} rows, {time.perf_counter() - began:.0f} s, {jax.devices()[0]}")
    given = [item.partition("=") for item in flags.mixers.split(";")]
    seconds = {name.strip(): float(own or flags.seconds) for name, _, own in given}
    with ThreadPoolExecutor(flags.threads) as pool:
        ready = {name: pool.submit(prepare, name, flags, train, test) for name in seconds}
        results: list[dict[str, Any]] = []
        for name in seconds:
            runs = ready[name].result()
            print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
            results.append(study(name, seconds[name], runs, flags, train, test, ends))
            Path(flags.output).write_text(json.dumps(results, indent=1))
            print(table(results[-1:]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
