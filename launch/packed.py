"""Runs that differ in seed and learning rate only, in one program: `jax.vmap` over the trainer's step.

Each run has its own batches, checkpoints and metrics.jsonl, the same files as if it had been trained alone.
A run whose loss is no longer finite fails by itself; the others go on.

Shape legend: R runs, leading axis of the state and of every batch.
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
from hybridlm import checkpoint, cost, data, interrupt, logbook, program, schema, sharding, trainer
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.errors import Stopped
from pallas_kernels import auto_means

log = logging.getLogger("hybridlm")


def alike(config: Any) -> str:
    """Equal for configs whose runs can share a program."""
    values = config.to_dict()
    del values["train"]["seed"], values["optimizer"]["learning_rate"]
    return repr(values)


@dataclasses.dataclass
class Member:
    """One of the runs. failed: why it did; "" while it goes on."""

    config: Any
    workdir: Path
    source: data.Dataset
    saves: checkpoint.Checkpoints
    record: dict[str, Any]
    book: logbook.Logbook | None = None
    failed: str = ""


def train(resolved: Sequence[Any], workdirs: Sequence[Path]) -> dict[Path, str]:
    """Trains ``resolved`` configs, which are `alike`, one in each workdir; workdir -> why it failed.

    tokens_per_second in the metrics is that of all runs together, and ``packed`` their number.
    Stopped when asked to leave; every run then has a checkpoint at the same step.
    """
    config = resolved[0]
    mesh = sharding.make_mesh(config.mesh)
    with ExitStack() as stack:
        stop = stack.enter_context(interrupt.Stop(config.train.max_minutes))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(auto_means("cudnn", "xla"))  # Pallas kernels have no rule for a batch of runs
        members = [_member(c, workdir, stack) for c, workdir in zip(resolved, workdirs, strict=True)]
        pack = Pack(members, mesh)
        start, state = pack.begin()
        for one in members:
            one.book = stack.enter_context(logbook.Logbook(one.workdir, one.config, start=start))
        if start < config.train.steps:
            pack.loop(start, state, stop)
    return {one.workdir: one.failed for one in members if one.failed}


def _member(config: Any, workdir: Path, stack: ExitStack) -> Member:
    keep, source = config.checkpoint, trainer.build_data(config, "train")
    checkpoint.mend(workdir / "checkpoints")
    saves = checkpoint.Checkpoints(workdir / "checkpoints", keep.keep_last, keep.keep_best, keep.best_metric)
    record = {
        "config": configs.portable(config),
        "layers": cost.summary(config),
        "fingerprint": source.fingerprint,
    }
    trainer.write_json(workdir / "config.json", record["config"])
    trainer.write_json(workdir / "layers.json", record["layers"])
    return Member(config, workdir, source, stack.enter_context(saves), record)


class Pack:
    """The members' program, and the loop around it."""

    def __init__(self, members: Sequence[Member], mesh: Any):
        self.members, self.config = members, members[0].config
        config, self.definition = self.config, lm.build(self.config)
        self.held_out = trainer.build_data(config, "val")
        self.measure = in_loop.build(config)
        self.rates_R = jnp.array([one.config.optimizer.learning_rate for one in members])
        token_bytes = members[0].source.token_bytes

        def at(rate: Any) -> program.Program:
            optimizer = schema.Optimizer(**config.optimizer.to_dict() | {"learning_rate": rate})
            sections = SimpleNamespace(train=config.train, optimizer=optimizer)
            return program.build(sections, self.definition, mesh, token_bytes)

        self.alone = at(config.optimizer.learning_rate)
        self.step = jax.jit(
            jax.vmap(lambda state, batch, rate: at(rate).step(state, batch)), donate_argnums=0
        )
        self.evaluate = jax.jit(jax.vmap(self.alone.evaluate, in_axes=(0, None)))

    def begin(self) -> tuple[int, Any]:
        """The newest step that all runs have a checkpoint of, and the states there; else 0 and new ones."""
        common = set.intersection(*(set(one.saves.steps()) for one in self.members))
        if not common:
            seeds = jnp.array([one.config.train.seed for one in self.members])
            return 0, jax.jit(jax.vmap(lambda seed: self.alone.init(jax.random.key(seed))))(seeds)
        start = max(common)
        for one in self.members:
            checkpoint.check_unchanged(one.saves.record(start), one.record)
        log.info("resumed %d runs from their checkpoints at step %d", len(self.members), start)
        states = [one.saves.restore(start, self.alone.shapes) for one in self.members]
        return start, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def loop(self, start: int, state: Any, stop: interrupt.Stop) -> None:
        config, steps = self.config, self.config.train.steps
        rows = [one.source.iterate(start) for one in self.members]
        draw = lambda: jax.tree.map(lambda *parts: np.stack(parts), *[next(batches) for batches in rows])
        began, batch = time.perf_counter(), draw()
        run = self.step.lower(state, batch, self.rates_R).compile()
        log.info("compiled %d runs in %.1f s", len(self.members), time.perf_counter() - began)
        mark, marked = time.perf_counter(), start
        for step in range(start + 1, steps + 1):
            state, metrics = run(state, batch, self.rates_R)
            last, asked = step == steps, bool(stop.asked()) and step < steps
            if not last:
                batch = draw()
            validates = last or trainer.due(step, config.eval.every_steps)
            saves = last or asked or trainer.due(step, config.checkpoint.every_steps)
            if validates or saves or trainer.due(step, config.log.every_steps):
                host = jax.device_get({k: v for k, v in metrics.items() if isinstance(v, jax.Array)})
                seconds = (time.perf_counter() - mark) / (step - marked)
                self.settle(step, state, host, seconds, validates, saves)
                mark, marked = time.perf_counter(), step
            if all(one.failed for one in self.members):
                return
            if asked:
                raise Stopped(f"stopped by {interrupt.reason(stop.asked())} after step {step}")

    def settle(
        self, step: int, state: Any, metrics_R: dict, seconds: float, validates: bool, saves: bool
    ) -> None:
        """A line for each run that goes on, with its validation and its checkpoint where they are due."""
        size = len(self.members)
        tokens = size * self.config.train.batch_size * self.config.train.seq_len
        timing = {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "packed": size}
        held_out = self.validation(state["params"]) if validates else [{}] * size
        for r, one in enumerate(self.members):
            values = {name: float(value_R[r]) for name, value_R in metrics_R.items()}
            bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            if bad and not one.failed:
                one.failed = f"step {step}: {bad[0]}. Lower the learning rate."
            if one.failed:
                continue
            own = jax.tree.map(lambda leaf, r=r: leaf[r], state)
            values |= held_out[r]
            if validates and self.measure is not None:
                values |= self.measure(self.definition, own["params"], one.source.tokenizer, step)
            assert one.book is not None
            one.book.write(step, values | timing)
            if saves:
                one.saves.save(step, own, one.record | {"step": step}, values)

    def validation(self, params: Any) -> list[dict[str, float]]:
        """`trainer.validation` of each run; what is held out does not depend on the seed."""
        count = min(self.config.eval.batches, self.held_out.num_batches or self.config.eval.batches)
        sums = jax.device_get([self.evaluate(params, self.held_out.batch(i)) for i in range(count)])
        return [
            trainer.held_out({name: sum(float(one[name][r]) for one in sums) for name in sums[0]})
            for r in range(len(self.members))
        ]
