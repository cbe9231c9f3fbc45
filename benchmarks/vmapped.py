"""Many runs of one small problem in one program: learning rates and seeds, all on the same batches.

The program is `hybridlm.program`'s of several runs. What is added is that the data lie on the device, so that
hundreds of steps go by in one call, and that cases of a study compile while others train.

Shape legend: R runs, rates x seeds, rate first; N rows of data; S steps of a call; B rows of a batch.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm import program, sharding
from hybridlm.data import generated
from hybridlm.data.source import Batch, View, empty_rows
from pallas_kernels import auto_means

Layer = tuple[str, Mapping[str, Any]]  # kind, settings, of which "of" may be a layer
EVALUATED = 2**15  # tokens at once


def config(layers: Sequence[Layer], *, steps: int = 1000, mlp_hidden: int = 0, **fields: Any) -> ConfigDict:
    """A float32 stack, embeddings tied; without ``mlp_hidden`` without MLPs. AdamW, clipped at 1, a cosine to
    0 behind a linear warm-up of 1/20. fields: others, such as ``model__d_model``. Not resolved."""
    c = configs.default()
    distinct, c.mixers = [repr(layer) for layer in layers], {}

    def define(layer: Layer, index: int) -> str:
        kind, settings = layer
        if isinstance(settings.get("of"), tuple):
            settings = {**settings, "of": define(settings["of"], index)}
        name = f"{kind.rpartition(':')[2]}_{index}"
        c.mixers[name] = configs.mixer(kind, **settings)
        return name

    names = [define(layer, distinct.index(repr(layer))) for layer in layers]
    pattern = " ".join(name if mlp_hidden else f"{name}/none" for name in names)
    c.model.update(pattern=pattern, mlp_hidden=mlp_hidden, tie_embeddings=True, dtype="float32", remat="none")
    c.optimizer.update(b2=0.98, final_ratio=0.0, warmup_steps=steps // 20)
    c.train.steps = steps
    c.data = configs.data("text", path="python-stdlib:")  # never opened
    for name, value in fields.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return c


def rows(task: generated.Config, split: str, length: int, vocab: int, count: int) -> Batch:
    """All rows of ``count`` examples of a split."""
    sized = dataclasses.replace(task, train_examples=count, val_examples=count)
    source = sized.open(View(split, length, 0, vocab))
    return source.rows(np.arange(source.num_rows))


class Runs:
    """R runs of one config, rate first; the compiled parts, and `state` once `train` has run.

    train_rows: [N, T] each.
    """

    def __init__(
        self,
        config: ConfigDict,
        train_rows: Batch,
        rates: Sequence[float],
        seeds: int,
        steps_per_call: int = 200,
    ):
        self.config, self.rows = configs.resolve(config), train_rows
        self.rates, self.seeds, self.steps_per_call = tuple(rates), seeds, steps_per_call
        every = [rate for rate in rates for _ in range(seeds)]
        mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
        self.program = program.build(self.config, lm.build(self.config), mesh, None, every)
        with auto_means("xla"):  # the kernels have no rule for a batch of runs
            keys = jax.vmap(jax.random.key)(jnp.tile(jnp.arange(seeds), len(rates)))
            shapes = jax.eval_shape(self.program.init, keys)
            chosen = jax.ShapeDtypeStruct((steps_per_call, self.config.train.batch_size), jnp.int32)
            self.init = jax.jit(self.program.init).lower(keys).compile()
            self.call = jax.jit(self._call, donate_argnums=0).lower(shapes, chosen, train_rows).compile()
        self.keys = keys

    def _call(self, state: Any, chosen_SB: jax.Array, rows: Batch) -> tuple[Any, jax.Array]:
        """(state after S steps, share of the labels predicted right by each run [R])."""
        runs = len(self.rates) * self.seeds

        def step(state: Any, chosen_B: jax.Array) -> tuple[Any, jax.Array]:
            every = lambda x: jnp.broadcast_to(x[chosen_B], (runs, *chosen_B.shape, *x.shape[1:]))
            state, metrics = self.program.step(state, jax.tree.map(every, rows))
            return state, metrics["accuracy"]

        state, accuracy_SR = jax.lax.scan(step, state, chosen_SB)
        return state, accuracy_SR.mean(axis=0)

    def train(
        self, until: float = 2.0, say: Callable[[str], None] = print, seconds: float = float("inf")
    ) -> list[tuple[int, np.ndarray]]:
        """Trains to the end, or until a learning rate has all its seeds above ``until``, or for ``seconds``.
        Returns (step, training accuracy [R]) of each call. Epochs draw rows without replacement."""
        order = batches(len(self.rows["tokens"]), self.config.train.batch_size)
        self.state, rows = self.init(self.keys), jax.device_put(self.rows)
        curve: list[tuple[int, np.ndarray]] = []
        began = time.perf_counter()
        for step in range(self.steps_per_call, self.config.train.steps + 1, self.steps_per_call):
            chosen = np.array([next(order) for _ in range(self.steps_per_call)], np.int32)
            self.state, hits = self.call(self.state, chosen, rows)
            curve.append((step, np.asarray(hits)))
            say(f"  step {step:6d}  {time.perf_counter() - began:5.0f} s  training accuracy {hits.max():.3f}")
            late = time.perf_counter() - began > seconds
            if late or self.by_rate(curve[-1][1]).min(axis=1).max() > until:
                break
        return curve

    def accuracy(self, rows: Batch) -> np.ndarray:
        """Share of the labels predicted right by each run, [R]."""
        count, length = rows["tokens"].shape
        size = max(1, min(count, EVALUATED // length))
        padded = {n: np.concatenate([x, empty_rows(-count % size, length)[n]]) for n, x in rows.items()}
        parts = [{n: x[i : i + size] for n, x in padded.items()} for i in range(0, count, size)]
        with auto_means("xla"):
            sums = [jax.device_get(self.program.evaluate(self.state["params"], part)) for part in parts]
        return sum(one["correct"] for one in sums) / sum(one["tokens"] for one in sums)

    def by_rate(self, values_R: np.ndarray) -> np.ndarray:
        """[rates, seeds]."""
        return values_R.reshape(len(self.rates), self.seeds)


def batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows [B] of each step's batch, epoch after epoch."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(num_rows)
        yield from order[: num_rows // batch_size * batch_size].reshape(-1, batch_size)


class Case(NamedTuple):
    """A line of a study: what is trained, on which rows, and the rows it is tested on by name."""

    config: ConfigDict
    train: Batch
    tests: Mapping[str, Batch]


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, help="of the schedule")
    parser.add_argument("--until", type=float, help="training accuracy of all seeds of a rate that ends it")
    parser.add_argument("--steps_per_call", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument(
        "--case_seconds", type=float, default=float("inf"), help="after which a case ends as it is"
    )
    parser.add_argument("--output", help="a JSON file, written after each line")
    parser.set_defaults(**defaults)
    return parser


def study(
    cases: Mapping[str, Callable[[], Case]],
    flags: argparse.Namespace,
    head: Sequence[str],
    show: Callable[[dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Trains every case, compiling ahead in threads; prints ``show`` of each result, and a table.

    A result is of the learning rate that is best on the mean over the tests and seeds: score and trained
    (training accuracy), one a seed; slices: score by test, mean over seeds.
    """
    results: list[dict[str, Any]] = []

    def prepare(make: Callable[[], Case]) -> tuple[Case, Runs]:
        case = make()
        return case, Runs(case.config, case.train, flags.rates, flags.seeds, flags.steps_per_call)

    with ThreadPoolExecutor(flags.threads) as pool:
        ready = {name: pool.submit(prepare, make) for name, make in cases.items()}
        for name in cases:
            case, runs = ready.pop(name).result()
            print(name, flush=True)
            began = time.perf_counter()
            curve = runs.train(flags.until, lambda text: print(text, flush=True), flags.case_seconds)
            seconds = round(time.perf_counter() - began, 1)
            slices = {test: runs.by_rate(runs.accuracy(rows)) for test, rows in case.tests.items()}
            score = np.mean(list(slices.values()), axis=0)
            best, steps = int(score.mean(axis=1).argmax()), curve[-1][0]
            found = {
                "name": name, "rates": runs.rates, "rate": runs.rates[best], "score": score[best].tolist(),
                "score_by_rate": score.mean(axis=1).tolist(), "steps": steps, "seconds": seconds,
                "slices": {test: values[best].mean().item() for test, values in slices.items()},
                "trained": runs.by_rate(curve[-1][1])[best].tolist(),
                "epochs": steps * case.config.train.batch_size / len(case.train["tokens"]),
                "curve": [(step, hits.max().item()) for step, hits in curve],
            }  # fmt: skip
            results.append(found)
            Path(flags.output).write_text(json.dumps(results, indent=1))
            print(show(found), flush=True)
    print("\n".join([row(*head), "|" + "---|" * len(head), *map(show, results)]))
    return results


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def row(*cells: Any) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"
