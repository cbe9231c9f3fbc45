"""Training: the loop around one jitted step, and everything that may happen between two steps.

The whole state of a run is {"params", "opt_state", "step"}; the batch of a step is a function of the seed
and the step, and there is no other randomness. A run that was killed and resumed therefore writes the same
metrics as one that was not.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import rich
from jax.sharding import Mesh

from hybridlm import config as configs
from hybridlm import cost, data, generate, init_from, report, sharding
from hybridlm import model as lm
from hybridlm.data import baselines
from hybridlm.errors import ConfigError, RunError, Stopped
from hybridlm.program import Program, State, build, compiled, per_token
from hybridlm.run import checkpoint, interrupt, logbook, private, processes, replay
from hybridlm.run.clock import Clock
from hybridlm.run.lock import Lock
from hybridlm.run.watch import Watch

log = logging.getLogger("hybridlm")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # on a CPU the bits are the same anyway
Metrics = dict[str, Any]
Evaluate = Callable[[lm.Definition, Any, Any, int], Metrics]  # (definition, params, tokenizer, step)


def train(
    config: Any, workdir: str | Path, resume: str = "auto", evaluate: Evaluate | None = None
) -> Metrics:
    """Trains what the resolved ``config`` describes and returns the last line of metrics.jsonl.

    workdir: gets config.json, layers.json, metrics.jsonl, events.jsonl, loss.png, checkpoints/.
    resume: auto, must or never; see `checkpoint.choose`.
    evaluate: measures the model beside each validation; its metrics join those of the step.
    Raises ConfigError before anything is compiled, RunError when the run cannot go on, and Stopped when it
    was asked to leave (`interrupt.Stop`) and has saved a checkpoint.
    """
    workdir = Path(workdir).absolute()
    with interrupt.Stop(config.train.max_minutes) as stop:
        mesh = sharding.make_mesh(config.mesh)
        configs.check_batch(config.train, mesh.shape)
        rows = sharding.batch_rows(mesh, config.train.batch_size)
        train_data, val_data = (build_data(config, split, rows) for split in ("train", "val"))
        definition = lm.build(config)
        with stored(workdir), contextlib.ExitStack() as stack:
            lock = stack.enter_context(Lock(workdir)) if processes.first() else None
            if processes.first() and resume != "never":
                checkpoint.mend(workdir / "checkpoints")
            processes.barrier("workdir")
            keep, directory = config.checkpoint, workdir / "checkpoints"
            stack.enter_context(jax.set_mesh(mesh))
            saves = stack.enter_context(
                checkpoint.Checkpoints(directory, keep.keep_last, keep.keep_best, keep.best_metric)
            )
            run = Run(config, workdir, mesh, definition, train_data, val_data, saves, stop, lock, evaluate)
            metrics = run.train(resume)
        with stored(workdir):
            if processes.first():
                summarise(config, workdir, metrics, val_data)
    return metrics


@contextlib.contextmanager
def stored(workdir: Path) -> Iterator[None]:
    """Turns what the disk refuses into a RunError."""
    try:
        yield
    except OSError as error:
        where = error.filename or workdir
        raise RunError(f"{where}: {error.strerror or error}. Checkpoints saved before are intact.") from error


@dataclasses.dataclass
class Run:
    """One start of a run, from choosing where to begin to the last step."""

    config: Any
    workdir: Path
    mesh: Mesh
    definition: lm.Definition
    train_data: data.Dataset
    val_data: data.Dataset
    saves: checkpoint.Checkpoints
    stop: interrupt.Stop
    lock: Lock | None
    evaluate: Evaluate | None

    def train(self, resume: str) -> Metrics:
        """To the last step; returns its metrics."""
        config, steps = self.config, self.config.train.steps
        self.record = {
            "config": configs.portable(config),
            "layers": cost.summary(config),
            "fingerprint": self.train_data.fingerprint,
        }
        start, saved = self.choose(resume)
        write_json(self.workdir / "config.json", self.record["config"])
        write_json(self.workdir / "layers.json", self.record["layers"])
        for dataset in (self.train_data, self.val_data):
            dataset.verify(jax.process_index(), jax.process_count())

        self.say_determinism()
        self.program = build(config, self.definition, self.mesh, self.train_data.token_bytes)
        state = self.begin(start)
        kept = start - 1 if "unwritten" in saved else start  # that line comes anew, at each resumption
        with logbook.Logbook(self.workdir, config, start=kept) as self.book:
            self.watch = Watch(
                self.workdir / "events.jsonl",
                self.definition,
                self.train_data.sample_ids,
                start,
                saved.get("skipped", (0, 0)),
            )
            metrics: Metrics = {}
            if "unwritten" in saved:  # the run was stopped before this step's line was complete
                metrics = self.finish(start, state, saved["unwritten"])
            if start < steps:
                metrics = self.loop(state, start)
            elif not metrics:  # resumed a run that was finished: only its summary is wanted
                metrics = self.validate(state["params"], steps) | self.sample(state["params"])
        return metrics

    def say_determinism(self) -> None:
        if jax.default_backend() == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
            log.info(
                "two runs may differ in the last bits here: for equal ones set XLA_FLAGS=%s", DETERMINISTIC
            )

    def choose(self, resume: str) -> tuple[int, dict[str, Any]]:
        """The step to start from, 0 for a new run, and what was recorded there."""
        step = checkpoint.choose(resume, self.saves) if processes.first() else None
        start = processes.agree(-1 if step is None else step)
        if start == 0:
            problem, fix = "holds an imported model, not a run", f"Use --config.init_from={self.workdir}."
            raise ConfigError("--workdir", str(self.workdir), problem, f"Give another. {fix}")
        start, saved = max(start, 0), {}
        if start:
            saved = self.saves.record(start)
            checkpoint.check_unchanged(saved | {"config": configs.completed(saved["config"])}, self.record)
            if start > self.config.train.steps:
                problem = f"the checkpoint is already at step {start}"
                raise ConfigError("train.steps", self.config.train.steps, problem, "Raise it.")
        elif self.config.init_from:
            init_from.check(self.config.init_from)
        return start, saved

    def begin(self, start: int) -> State:
        """The state at step ``start``."""
        if start:
            state = self.saves.restore(start, self.program.shapes)
            log.info("resumed from the checkpoint at step %d", start)
            return state
        state = self.program.init(jax.random.key(self.config.train.seed))
        if other := self.config.init_from:
            state["params"] = init_from.start(other, self.definition, state["params"], self.workdir)
        return state

    def loop(self, state: State, start: int) -> Metrics:
        config, steps = self.config, self.config.train.steps
        run = compiled(self.program, self.mesh, self.train_data.batch(start), config.train.batch_size)
        if jax.process_count() == 1 and self.stop.asked():
            raise Stopped(f"stopped by {interrupt.reason(self.stop.asked())} before step {start + 1}")
        vote = interrupt.vote(self.mesh)
        self.clock = clock = Clock(config, self.mesh.size)
        batches = self.train_data.iterate(start)
        metrics: Metrics = {}
        behind: tuple[int, dict] | None = None  # dispatched, its metrics not read yet
        for step in range(start + 1, steps + 1):
            batch = sharding.put_batch(clock.next(batches), self.mesh, config.train.batch_size)
            state, now = run(state, batch)
            if behind:  # read one step late, so that the devices always have the next one queued
                metrics = self.settle(*behind)
                if due(behind[0], config.log.every_steps):
                    self.book.write(behind[0], metrics | clock.rates())
            behind = step, now
            asked = vote(self.stop.asked())
            if asked or self.pauses(step) or self.watch.in_a_row >= config.train.max_skipped:
                metrics = self.settle(*behind) | clock.rates()
                behind = None
                if self.watch.in_a_row > config.train.max_skipped:
                    self.give_up(step, state)
                if asked and step < steps:
                    self.leave(step, state, metrics, interrupt.reason(asked))
                if self.pauses(step):
                    metrics = self.finish(step, state, metrics)
                elif due(step, config.log.every_steps):
                    self.book.write(step, metrics)
                if step == steps or due(step, config.checkpoint.every_steps):
                    self.save(step, state, metrics)
                clock.restart()
        return metrics

    def pauses(self, step: int) -> bool:
        """Whether something besides the next step follows ``step``, a line of metrics apart."""
        config = self.config
        every = (config.eval.every_steps, config.eval.sample_every_steps, config.checkpoint.every_steps)
        return step == config.train.steps or any(due(step, one) for one in every)

    def settle(self, step: int, metrics: dict[str, Any]) -> Metrics:
        """Waits for ``step`` and returns its metrics, those that are finite."""
        metrics = dict(metrics)
        squared_norms = metrics.pop("squared_norms")
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.tick()
        if self.lock:
            self.lock.check()
        return self.watch.see(step, values, squared_norms)

    def give_up(self, step: int, state: State) -> NoReturn:
        """Ends the run after ``step``, the newest, with a dump of the first of the skipped ones.

        None of them changed ``state``, so it is what the first began with.
        """
        first = step - self.watch.in_a_row + 1
        dump = self.workdir / f"dump-{first}"
        replay.dump(dump, self.config, first, state, self.train_data.whole_batch(first - 1))
        raise RunError(
            f"step {step}: loss or gradient is not finite, {self.watch.in_a_row} updates in a row since step "
            f"{first}; earlier checkpoints are intact. python -m hybridlm.run.replay {dump} repeats step "
            f"{first}; events.jsonl names the samples. Lower the learning rate, or look at the data."
        )

    def leave(self, step: int, state: State, metrics: Metrics, reason: str) -> NoReturn:
        """Saves after ``step`` and ends the run; a line that is due is left to the run that resumes."""
        lines = self.pauses(step) or due(step, self.config.log.every_steps)
        self.save(step, state, metrics, {"unwritten": metrics} if lines else {})
        self.saves.wait()
        raise Stopped(f"stopped by {reason} with a complete checkpoint at step {step}")

    def save(self, step: int, state: State, metrics: Metrics, more: dict[str, Any] | None = None) -> None:
        for dataset in (self.train_data, self.val_data):
            dataset.verified()  # no checkpoint holds what was learnt from damaged data
        record = self.record | {"step": step, "skipped": self.watch.counts} | (more or {})
        self.saves.save(step, state, record, metrics)

    def finish(self, step: int, state: State, metrics: Metrics) -> Metrics:
        """Validates and samples after ``step`` if that is due, and writes its line."""
        last, config = step == self.config.train.steps, self.config.eval
        if last or due(step, config.every_steps):
            metrics |= self.validate(state["params"], step)
        if last or due(step, config.sample_every_steps):
            metrics |= self.sample(state["params"])
        self.book.write(step, metrics)
        return metrics

    def validate(self, params: Any, step: int) -> Metrics:
        metrics = validation(self.program, self.mesh, self.val_data, self.config.eval.batches, params)
        if self.evaluate:
            metrics |= self.evaluate(self.definition, params, self.train_data.tokenizer, step)
        return metrics

    def sample(self, params: Any) -> Metrics:
        return sample(self.config, self.definition, self.train_data.tokenizer, params)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build_data(config: Any, split: str, rows: np.ndarray | None = None) -> data.Dataset:
    """One split; rows: those of each batch that this process reads, None for all."""
    t = config.train
    sizes = {"batch_size": t.batch_size, "seq_len": t.seq_len, "vocab_size": config.model.vocab_size}
    return data.build(config.data, split=split, seed=t.seed, rows=rows, **sizes)


def validation(program: Program, mesh: Mesh, dataset: data.Dataset, batches: int, params: Any) -> Metrics:
    """val_loss, val_accuracy and val_bpb over the first ``batches`` held-out batches, the same every time."""
    count = min(batches, dataset.num_batches or batches)
    put = lambda i: sharding.put_batch(dataset.batch(i), mesh, dataset.batch_size)
    sums = [program.evaluate(params, put(i)) for i in range(count)]
    host = jax.device_get(sums)
    return held_out({name: sum(float(one[name]) for one in host) for name in host[0]})


def held_out(sums: dict[str, float]) -> Metrics:
    """Sums over held-out batches as the metrics of a validation."""
    names = {"loss": "val_loss", "accuracy": "val_accuracy", "bits_per_byte": "val_bpb"}
    return {names.get(name, f"val_{name}"): value for name, value in per_token(sums).items()}


def sample(config: Any, definition: lm.Definition, tokenizer: Any, params: Any) -> Metrics:
    """{"sample": text}, or nothing when the config wants none or the tokens stand for no text."""
    wanted = config.eval
    if tokenizer is None or not wanted.sample_tokens:
        return {}
    tokens = generate.generate(
        definition,
        params,
        [[tokenizer.doc_id, *tokenizer.encode(wanted.sample_prompt)]],
        max_new_tokens=wanted.sample_tokens,
        sampling=generate.Sampling(temperature=wanted.temperature),
        seed=config.train.seed,
        stop=tokenizer.doc_id,
    )
    return {"sample": wanted.sample_prompt + tokenizer.decode(tokens[0])}


def summarise(config: Any, workdir: Path, metrics: Metrics, held_out: data.Dataset) -> None:
    """Draws loss.png and prints what the run came to: layers, held-out loss beside references, paths."""
    logbook.plot(logbook.read(workdir / "metrics.jsonl"), workdir / "loss.png")
    console = rich.get_console()
    console.print(report.layer_table(config))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(report.full_layers(config))
    say(f"held-out loss: {metrics['val_loss']:.4f} nats per token")
    text = held_out.held_out_bytes(config.eval.batches)
    if text:
        say(f"held-out bits per byte, on the same {len(text):,} bytes:")
        say(f"  this model       {metrics['val_bpb']:.3f}")
        say(f"  gzip -9          {baselines.gzip_bits_per_byte(text):.3f}")
        say(f"  order-0 entropy  {baselines.order0_bits_per_byte(text):.3f}")
    if "sample" in metrics:
        say(f"sample:\n{logbook.printable(metrics['sample'])}")
    say("written:")
    for name in ("metrics.jsonl", "loss.png", "config.json", "layers.json", "checkpoints"):
        say(private.hide(f"  {workdir / name}"))


def write_json(path: Path, value: Any) -> None:
    if jax.process_index() == 0:
        path.write_text(json.dumps(value, indent=2) + "\n")
