"""Runs that differ in seed and learning rate only, trained in one program: `jax.vmap` over `trainer.build`.

Each run has its own batches, checkpoints and metrics.jsonl, the same files as if it had been trained alone.
A run whose loss is no longer finite fails by itself; the others go on.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval import in_loop
from hybridlm import checkpoint, cost, logbook, schema, sharding, trainer
from hybridlm import model as lm
from pallas_kernels.op import auto_means

log = logging.getLogger("hybridlm")

FREE = ("seed", "learning_rate")  # fields in which packed runs may differ


def alike(config: Any) -> str:
    """Equal for configs whose runs can share a program."""
    values = config.to_dict()
    del values["train"]["seed"], values["optimizer"]["learning_rate"]
    return repr(values)


def train(configs: Sequence[Any], workdirs: Sequence[Path]) -> dict[Path, str]:
    """Trains resolved ``configs``, which are `alike`, one in each workdir; workdir -> why it failed.

    tokens_per_second in the metrics is that of all runs together, and ``packed`` their number.
    """
    config, rates = configs[0], jnp.array([c.optimizer.learning_rate for c in configs])
    mesh = sharding.make_mesh(config.mesh)
    sources = [trainer.build_data(c, "train") for c in configs]
    held_out = trainer.build_data(config, "val")
    definition = lm.build(config)
    summary = cost.summary(config)
    records = [
        {"config": c.to_dict(), "layers": summary, "fingerprint": source.fingerprint}
        for c, source in zip(configs, sources, strict=True)
    ]
    for workdir, record in zip(workdirs, records, strict=True):
        trainer.write_json(workdir / "config.json", record["config"])
        trainer.write_json(workdir / "layers.json", record["layers"])

    def program(rate: Any) -> trainer.Program:
        optimizer = dataclasses.replace(schema.Optimizer(**config.optimizer.to_dict()), learning_rate=rate)
        return trainer.build(
            SimpleNamespace(train=config.train, optimizer=optimizer), definition, mesh, sources[0].token_bytes
        )

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(auto_means("xla"))  # the kernels have no rule for a batch of runs
        keep = config.checkpoint
        saves = [
            stack.enter_context(
                checkpoint.Checkpoints(
                    workdir / "checkpoints", keep.keep_last, keep.keep_best, keep.best_metric
                )
            )
            for workdir in workdirs
        ]
        one = program(config.optimizer.learning_rate)
        start, state = _start(one, saves, records, [c.train.seed for c in configs])
        books = [
            stack.enter_context(logbook.Logbook(w, c, start=start))
            for w, c in zip(workdirs, configs, strict=True)
        ]
        step_fn = jax.jit(
            jax.vmap(lambda state, batch, rate: program(rate).step(state, batch)), donate_argnums=0
        )
        validate = jax.jit(jax.vmap(one.evaluate, in_axes=(0, None)))
        measure = in_loop.build(config)
        batches = [source.iterate(start) for source in sources]
        draw = lambda: jax.tree.map(lambda *rows: np.stack(rows), *[next(rows) for rows in batches])
        if start < config.train.steps:
            began, batch = time.perf_counter(), draw()
            run = step_fn.lower(state, batch, rates).compile()
            log.info("compiled %d runs in %.1f s", len(configs), time.perf_counter() - began)
        failed: dict[Path, str] = {}
        tokens = len(configs) * config.train.batch_size * config.train.seq_len
        mark, marked = time.perf_counter(), start
        for step in range(start + 1, config.train.steps + 1):
            state, metrics = run(state, batch, rates)
            last = step == config.train.steps
            if not last:
                batch = draw()
            validates = last or trainer.due(step, config.eval.every_steps)
            saving = last or trainer.due(step, config.checkpoint.every_steps)
            if not (validates or saving or trainer.due(step, config.log.every_steps)):
                continue
            host = jax.device_get(metrics)
            seconds = (time.perf_counter() - mark) / (step - marked)
            timing = {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "packed": len(configs)}
            sums = (
                _validation(validate, held_out, config.eval.batches, state["params"]) if validates else None
            )
            for r, workdir in enumerate(workdirs):
                values = {name: float(value[r]) for name, value in host.items() if np.ndim(value) == 1}
                bad = [name for name, value in values.items() if not math.isfinite(value)]
                if bad and workdir not in failed:
                    failed[workdir] = f"step {step}: {bad[0]} is {values[bad[0]]}. Lower the learning rate."
                if workdir in failed:
                    continue
                member = jax.tree.map(lambda leaf, r=r: leaf[r], state)
                if sums is not None:
                    values |= sums[r]
                    if measure is not None:
                        values |= measure(definition, member["params"], sources[r].tokenizer, step)
                books[r].write(step, values | timing)
                if saving:
                    saves[r].save(step, member, records[r] | {"step": step}, values)
            if len(failed) == len(workdirs):
                break
            mark, marked = time.perf_counter(), step
    return failed


def _start(
    program: trainer.Program, saves: list[checkpoint.Checkpoints], records: list[dict], seeds: list[int]
) -> tuple[int, Any]:
    """The newest step that every run has a checkpoint of, and the states there; 0 and new ones without."""
    common = set.intersection(*(set(one.steps()) for one in saves))
    if not common:
        return 0, jax.jit(jax.vmap(lambda seed: program.init(jax.random.key(seed))))(jnp.array(seeds))
    start = max(common)
    for one, record in zip(saves, records, strict=True):
        checkpoint.check_unchanged(one.record(start), record)
    log.info("resumed %d runs from their checkpoints at step %d", len(saves), start)
    return start, jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[one.restore(start, program.shapes) for one in saves]
    )


def _validation(evaluate: Any, held_out: Any, batches: int, params: Any) -> list[dict[str, float]]:
    """`trainer.validation` of each run."""
    count = min(batches, held_out.num_batches or batches)
    sums = jax.device_get([evaluate(params, held_out.batch(i)) for i in range(count)])
    names = {"loss": "val_loss", "accuracy": "val_accuracy", "bits_per_byte": "val_bpb"}
    result = []
    for r in range(len(sums[0]["tokens"])):
        means = trainer.per_token({name: sum(float(one[name][r]) for one in sums) for name in sums[0]})
        result.append({names.get(name, f"val_{name}"): value for name, value in means.items()})
    return result
