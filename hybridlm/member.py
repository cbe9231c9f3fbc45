"""One run as the training loop sees it: its data, its folder, what it has measured, why it failed."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import hybridlm
from hybridlm import config as configs
from hybridlm import (
    cost,
    data,
    generate,
    groups,
    init_from,
    objectives,
    optimizer,
    stages,
    untrusted,
    weights,
)
from hybridlm import model as lm
from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.program import NORMS, State, per_token
from hybridlm.run import checkpoint, logbook, private, processes, replay, sound, tracking
from hybridlm.run.lock import Lock
from hybridlm.run.watch import Watch

log = logging.getLogger("hybridlm")

Metrics = dict[str, Any]
Evaluate = Callable[[lm.Definition, Any, Any, int], Metrics]  # (definition, params, tokenizer, step)


class Member:
    """config, workdir: of this run, or of one of its stages, which begins after step ``begin`` of ``whole``.
    evaluate: measures the model beside each validation; may be None.

    metrics: of the newest settled step.  failed: why the run ended, "" while it goes on.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        evaluate: Evaluate | None,
        rows: np.ndarray,
        whole: Config | None = None,
        begin: int = 0,
    ):
        self.config, self.workdir, self.evaluate = config, workdir, evaluate
        self.whole, self.stage_begin = whole or config, begin
        self.train_data, self.val_data = (build_data(config, split, rows) for split in ("train", "val"))
        self.val_sets = {name: val_set(config, name, self.train_data, rows) for name in config.val}
        self.datasets = (self.train_data, self.val_data, *self.val_sets.values())
        self.definition = lm.build(config)
        self.teacher: str = getattr(config.objective, "teacher", "")
        groups.check(config)  # refuses what fits no parameter,
        objectives.build(config.objective, self.definition)  # and no teacher of another vocabulary
        self.record: dict[str, Any] = {
            "config": configs.portable(self.whole),
            "layers": cost.summary(config),
            "fingerprint": self.train_data.fingerprint,
            "format": checkpoint.FORMAT,
            "teacher": self.teachers(),
            "held_out": {name: one.fingerprint for name, one in self.held_out().items()},
        }
        self.metrics: Metrics = {}
        self.saved: dict[str, Any] = {}
        self.failed = ""

    def held_out(self) -> dict[str, data.Dataset]:
        """What is validated on, by the fields that name it."""
        return {"data": self.val_data} | {f"val.{name}": one for name, one in self.val_sets.items()}

    def identity(self) -> dict[str, str]:
        """What every process of a run must have in common, as name -> value."""
        fields = checkpoint.dotted(self.record["config"])
        own = {
            "data.fingerprint": self.record["fingerprint"],
            "jax": jax.__version__,
            "hybridlm": hybridlm.__version__,
            "--workdir": private.hide(str(self.workdir)),
        }
        return {name: str(value) for name, value in (fields | own).items()}

    def open(self, stack: ExitStack, resume: str) -> None:
        """Takes the workdir and opens its checkpoints, until ``stack`` closes."""
        tracking.check_tensorboard(self.config.log.tensorboard and processes.first())
        sound.check_place(self.workdir / "checkpoints")
        self.lock = stack.enter_context(Lock(self.workdir)) if processes.first() else None
        if processes.first() and resume != "never":
            sound.mend(self.workdir / "checkpoints")
        processes.barrier("workdir")
        keep, directory = self.config.checkpoint, self.workdir / "checkpoints"
        saves = checkpoint.Checkpoints(directory, keep.keep_last, keep.keep_best)
        self.saves = stack.enter_context(saves)

    def begin(self, stack: ExitStack, start: int) -> None:
        """From step ``start`` on: writes what describes the run, and opens its records."""
        for name, value in (("config.json", self.record["config"]), ("layers.json", self.record["layers"])):
            if processes.first():
                untrusted.write_json(self.workdir / name, value)
        if processes.first():
            weights.keep_tokenizer(self.workdir, self.train_data.tokenizer)
        for dataset in self.datasets:
            dataset.verify(jax.process_index(), jax.process_count())
        book = logbook.Logbook(self.workdir, self.config, start=start)
        self.book = stack.enter_context(book)
        for line in book.kept:
            self.rank(line)
        events, samples = self.workdir / "events.jsonl", self.train_data.sample_ids
        counts = self.saved.get("skipped", (0, 0))
        self.watch = Watch(events, self.definition, samples, start, counts)

    def read_record(self, start: int) -> None:
        """Reads the record of the checkpoint at ``start``; ConfigError if this run cannot go on there."""
        self.saved = self.saves.record(start)
        if self.saved.get("format") != checkpoint.FORMAT:
            problem = "holds checkpoints of hybridlm 0.1.0, whose parameters are not named by layer"
            fix = f"Convert them: python -m hybridlm.convert upgrade --workdir={self.workdir}"
            raise ConfigError("--workdir", str(self.workdir), problem, fix)
        before, saved = None, self.saved
        with contextlib.suppress(ConfigError):  # one of an older version may not resolve any more
            before = configs.resolve(ConfigDict(self.saved["config"]))
            saved = saved | {"config": configs.portable(before)}  # with the defaults of fields that are new
        if not self.stage_begin < start <= self.config.train.steps:  # saved by another stage, of other rows
            saved = saved | {"fingerprint": self.record["fingerprint"], "held_out": {}}
        for name, now in self.record["held_out"].items():
            if saved.get("held_out", {}).get(name, now) != now:
                said = "%s holds out others than up to step %d: losses on them do not compare"
                log.warning(said, name, start)
        checkpoint.check_unchanged(saved, self.record)
        if start > self.whole.train.steps:
            problem = f"the checkpoint is already at step {start}"
            raise ConfigError(*stages.last_steps(self.whole), problem, "Raise it.")
        if before is not None and start > self.stage_begin:
            self.say_rates(dict(stages.split(before, configs.resolve))[self.stage_begin], start)

    def parts(self) -> list[Config]:
        """The configs of the run's stages up to this one."""
        return [one for begin, one in stages.split(self.whole, configs.resolve) if begin <= self.stage_begin]

    def teachers(self) -> dict[str, str]:
        """The teacher's folder, however it was spelt, and which parameters it has now; {} without one."""
        if not self.teacher:
            return {}
        folder = init_from.split(self.teacher)[0].resolve()
        return {private.hide(str(folder)): init_from.identity(self.teacher)}

    def check_teacher(self) -> None:
        """ConfigError if the folder of the teacher has other parameters than when the run began."""
        # An older version recorded "" of a public one.
        known = (self.saved.get("teacher", {}), self.record["teacher"])
        if any((one.get(folder) or now) != now for one in known for folder, now in self.teachers().items()):
            problem = "has another newest checkpoint, or other files, than when this run began"
            fix = "Bring those back, or start anew in another --workdir."
            raise ConfigError("objective.teacher", self.teacher, problem, fix)

    def say_rates(self, old: Config, start: int) -> None:
        """Says what the learning rate will do if it goes on otherwise than in ``old``, the checkpoint's."""
        begin = self.stage_begin
        of = lambda one: optimizer.schedule(one.optimizer, one.train.steps - begin)
        rate = lambda one, step: float(of(one)(step - begin))
        last, now = rate(old, start - 1), rate(self.config, start)
        end = start >= old.train.steps
        unchanged = math.isclose(now, last if end else rate(old, start), rel_tol=1e-6)
        if unchanged or start >= self.config.train.steps:
            return
        schedule, steps = self.config.optimizer.schedule, self.config.train.steps - begin
        said = f"learning rate: {last:.3g} at step {start}, then {now:.3g} ({schedule} over {steps} steps)"
        if now > 1.05 * last and last < 0.95 * rate(old, begin + max(0, old.optimizer.warmup_steps - 1)):
            fix = "to extend a run without that, resume it from a checkpoint before its decay"
            log.warning("%s: it had decayed and rises again; %s", said, fix)
        else:
            log.info("%s", said)

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens ``every`` so many steps follows ``step``; always after the last."""
        return step == self.config.train.steps or due(step, every)

    def settle(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of ``step``, host values but for the norms."""
        values = {name: float(value) for name, value in metrics.items() if name != NORMS}
        if self.lock:
            self.lock.check()
        self.metrics = self.watch.see(step, values, metrics[NORMS])

    def give_up(self, step: int, state: State, microbatches: int) -> None:
        """Ends the run after ``step``, the newest, with a dump of the first of the skipped ones, which had
        so many ``microbatches``.

        None of them changed ``state``, so it is what the first began with.
        """
        first = step - self.watch.in_a_row + 1
        dump = self.workdir / f"dump-{first}"
        stage = self.config.train.steps - self.stage_begin  # whose own the schedule is
        config = self.config.replace(train__steps=stage, train__profile_steps=())
        config = config.replace(train__microbatches=microbatches)
        replay.dump(dump, config, first, state, self.train_data.whole_batch(first - 1))
        self.failed = (
            f"step {step}: loss, gradient or update is not finite, {self.watch.in_a_row} updates in a row "
            f"since step {first}; earlier checkpoints are intact. python -m hybridlm.run.replay {dump} "
            f"repeats step {first}; events.jsonl names the samples. Lower the learning rate, or look at the "
            "data."
        )

    def save(self, step: int, state: State, rates: Metrics) -> None:
        """Starts a checkpoint. If a line of metrics is due at ``step``, what is known of it goes with it."""
        self.train_data.verified()  # no checkpoint holds what was learnt from damaged data
        record = self.record | {"step": step, "skipped": (self.watch.skipped, self.watch.in_a_row)}
        if self.pauses(step) or due(step, self.config.log.every_steps):
            record |= {"unwritten": self.metrics | rates}
        self.saves.save(step, state, record)

    def pauses(self, step: int) -> bool:
        """Whether something besides the next step follows ``step``, a line of metrics apart."""
        config = self.config
        every = (config.eval.every_steps, config.eval.sample_every_steps, config.checkpoint.every_steps)
        return any(self.due(step, one) for one in every)

    def finish(
        self, step: int, params: Any, measures: Mapping[str, Callable[[], Metrics]], rates: Metrics
    ) -> None:
        """Validates (``measures``) and samples after ``step`` where that is due, and writes its line."""
        metrics = self.metrics | rates
        if self.due(step, self.config.eval.every_steps):
            for what, measure in measures.items():
                metrics |= self.look(step, what, measure)
            if self.evaluate is not None:
                evaluate = self.evaluate
                tasks = lambda: evaluate(self.definition, params, self.tokenizer(), step)
                metrics |= self.look(step, "eval.tasks", tasks)
        if self.due(step, self.config.eval.sample_every_steps):
            text = lambda: sample(self.config, self.definition, self.tokenizer(), params)
            metrics |= self.look(step, "sample", text)
        self.write(step, metrics)

    def tokenizer(self) -> Tokenizer | None:
        """That of the data, which knows how texts end in the model that the run began with."""
        found = self.train_data.tokenizer
        if found is not None:
            found.more_ends = weights.ends(self.workdir, found)
        return found

    def look(self, step: int, what: str, measure: Callable[[], Metrics]) -> Metrics:
        """What ``measure`` finds. Looking never ends a run: an exception is an event, and nothing is found.

        Of several processes one alone may fail, and the others would wait for it: there it is raised.
        """
        try:
            return measure()
        except Exception as error:
            if jax.process_count() > 1:
                raise
            self.watch.trouble(step, what, error)
            return {}

    def write(self, step: int, metrics: Metrics) -> None:
        """The line of ``step``; what is not finite in it is null there, and what the disk refuses waits."""
        values, lost = logbook.recordable(metrics)
        if lost:
            self.watch.note(step, "not finite", metrics=lost)
        if problem := self.book.write(step, values):
            self.watch.note(step, "metrics.jsonl cannot be written, its lines wait", error=problem)
        self.metrics = {name: value for name, value in values.items() if value is not None}
        self.rank({"step": step, **self.metrics})

    def rank(self, line: Metrics) -> None:
        """Tells the checkpoints how good the one at a line's step is."""
        value = line.get(self.config.checkpoint.best_metric)
        if isinstance(value, float):
            self.saves.scores[line["step"]] = value


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build_data(config: Config, split: str, rows: np.ndarray | None = None, name: str = "") -> data.Dataset:
    """One split; rows: those of each batch that this process reads, None for all.

    name: of one of ``config.val`` in place of ``config.data``.
    """
    t = config.train
    sizes = {"batch_size": t.batch_size, "seq_len": t.seq_len, "vocab_size": config.model.vocab_size}
    sizes |= {"pieces": config.mesh.over(jax.device_count()).get("context", 1)}
    given, prefix = (config.val[name], f"val.{name}") if name else (config.data, "data")
    return data.build(given, split=split, seed=t.seed, rows=rows, prefix=prefix, **sizes)


def val_set(config: Config, name: str, train_data: data.Dataset, rows: np.ndarray | None) -> data.Dataset:
    """The held-out part of ``config.val[name]``; ConfigError where its tokens are not those of training."""
    found = build_data(config, "val", rows, name)
    ours, theirs = train_data.tokenizer, found.tokenizer
    if ours is not None and theirs is not None and ours.fingerprint != theirs.fingerprint:
        problem = f"has the tokenizer {theirs.name}, the training data {ours.name}"
        raise ConfigError(f"val.{name}", config.val[name].kind, problem, "Prepare it with the same.")
    return found


def held_out(sums: Mapping[str, Any]) -> Metrics:
    """Sums over held-out batches as the metrics of a validation."""
    names = {"loss": "val_loss", "accuracy": "val_accuracy", "bits_per_byte": "val_bpb"}
    return {names.get(name, f"val_{name}"): value for name, value in per_token(dict(sums)).items()}


def sample(config: Config, definition: lm.Definition, tokenizer: Tokenizer | None, params: Any) -> Metrics:
    """{"sample": text}, or nothing when the config wants none or the tokens stand for no text."""
    wanted = config.eval
    if tokenizer is None or not wanted.sample_tokens:
        return {}
    prompt = [tokenizer.doc_id, *tokenizer.encode(wanted.sample_prompt)]
    how = generate.Sampling(temperature=wanted.temperature)
    options: dict[str, Any] = {"max_new_tokens": wanted.sample_tokens, "seed": config.train.seed}
    [text] = generate.complete(definition, params, tokenizer, [prompt], sampling=how, **options)
    return {"sample": wanted.sample_prompt + text}
