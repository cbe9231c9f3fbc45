"""Training: the loop around one jitted step, and everything that may happen between two steps.

The loop trains one run, or several together that differ in seed and learning rate only (`Member`s, under
`jax.vmap`); a member that fails leaves the others alone. The whole state of a run is {"params", "opt_state",
"step"} and, if it is wanted, "ema"; the batch of a step is a function of the seed and the step, and there is
no other randomness. A run that was killed and resumed therefore writes the same metrics as one that was not.

Save first, then look: the checkpoint of a step is begun before the step is validated, sampled or plotted.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import rich
from jax.sharding import Mesh

from hybridlm import config as configs
from hybridlm import cost, init_from, opening, program, report, sharding, stages
from hybridlm.config import Config
from hybridlm.data import Dataset, baselines
from hybridlm.errors import ConfigError, RunError, Stopped
from hybridlm.member import Evaluate, Member, Metrics, due, held_out
from hybridlm.program import NORMS, State
from hybridlm.run import checkpoint, cli, interrupt, logbook, picture, private, processes, profile, programs
from hybridlm.run.clock import Clock
from pallas_kernels import auto_means

log = logging.getLogger("hybridlm")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # on a CPU the bits are the same anyway


def train(
    config: Config, workdir: str | Path, resume: str = "auto", evaluate: Evaluate | None = None
) -> Metrics:
    """Trains what ``config`` describes and returns the last line of metrics.jsonl.

    workdir: gets config.json, layers.json, metrics.jsonl, events.jsonl, loss.png, checkpoints/.
    resume: auto, must or never; see `checkpoint.choose`.
    evaluate: measures the model beside each validation; its metrics join those of the step.
    Raises ConfigError before anything is compiled, RunError when the run cannot go on, and Stopped when it
    was asked to leave (`interrupt.Stop`) and has saved a checkpoint.
    """
    [member] = together([config], [Path(workdir)], resume, [evaluate])
    if member.failed:
        raise RunError(member.failed)
    if processes.first():
        with logbook.harmless("the summary"):
            tell(member)
    return member.metrics


def alike(config: Config) -> str:
    """Equal for configs whose runs can be trained together."""
    return repr(config.replace(train__seed=0, optimizer__learning_rate=0.0))


def together(
    resolved: Sequence[Config],
    workdirs: Sequence[Path],
    resume: str = "auto",
    evaluates: Sequence[Evaluate | None] | None = None,
) -> list[Member]:
    """Trains configs that are `alike`, one in each workdir, in one program; what became of each.

    With several, tokens_per_second in the metrics is that of all together, and ``packed`` their number.
    """
    config = resolved[0]
    programs.enable(config.train.compilation_cache)
    workdirs = [workdir.absolute() for workdir in workdirs]
    with (
        interrupt.Stop(config.train.max_minutes) as stop,
        cli.stored(workdirs[0], "Checkpoints saved before are intact."),
    ):
        mesh = sharding.make_mesh(config.mesh)
        if len(resolved) > 1 and "context" in mesh.shape:
            problem = "runs that are trained together do not cut sequences"
            raise ConfigError("mesh.context", mesh.shape["context"], problem, "Set mesh.context=1.")

        def joined(part: Sequence[tuple[int, Config]]) -> list[Member]:
            begin, first = part[0]
            configs.check_batch(first.train, mesh.shape)
            rows = sharding.batch_rows(mesh, first.train.batch_size)
            given = zip(part, resolved, workdirs, evaluates or [None] * len(workdirs), strict=True)
            return [Member(one, at, evaluate, rows, whole, begin) for (_, one), whole, at, evaluate in given]

        parts = zip(*map(stages.split, resolved), strict=True)
        for members in list(map(joined, parts)):  # a later stage is refused before the first
            again = members[0].stage_begin and resume == "never"
            stage(members, mesh, stop, "auto" if again else resume)
            if any(member.failed for member in members):
                break
        for member in members if processes.first() else ():
            if not member.failed:
                draw(member)
    return members


def stage(members: Sequence[Member], mesh: Mesh, stop: interrupt.Stop, resume: str) -> None:
    """Trains one stage of the members, or what there is of them without stages."""
    for member in members:
        processes.same(member.identity())
    with ExitStack() as stack:
        for member in members:
            member.open(stack, resume)
        stack.enter_context(jax.set_mesh(mesh))
        if len(members) > 1:
            stack.enter_context(auto_means("xla"))  # the kernels have no rule for a batch of runs
        Trainer(members, mesh, stop).train(resume)


class Trainer:
    """One start of the members, from choosing where to begin to the last step."""

    def __init__(self, members: Sequence[Member], mesh: Mesh, stop: interrupt.Stop):
        self.members, self.mesh, self.stop = members, mesh, stop
        self.config, self.definition = members[0].config, members[0].definition
        self.several = len(members) > 1
        rates = [one.config.optimizer.learning_rate for one in members] if self.several else None
        bytes_of = members[0].train_data.token_bytes
        self.begins = members[0].stage_begin
        self.program = program.build(self.config, self.definition, mesh, bytes_of, rates, self.begins)
        self.teacher: tuple[Any, ...] = ()
        self.apart, self.join, self.like = program.by_layer(self.definition, self.program)

    def train(self, resume: str) -> None:
        start = self.choose(resume)
        if start > self.config.train.steps:  # in a later stage
            return
        if processes.first():
            with logbook.harmless("saying what the run is"):
                self.open(start)
        self.say_determinism()
        self.teacher = init_from.teacher(self.config, self.program)
        state = self.begin(start)
        with ExitStack() as stack:
            for member in self.members:
                member.begin(stack, start)
            owed = any("unwritten" in one.saved and one.book.last < start for one in self.members)
            if processes.agree(int(owed)):  # the run ended before this step's line was complete
                for one in self.members:
                    one.metrics = one.saved["unwritten"]
                self.finish(start, state, {})
            elif start == self.config.train.steps:  # finished before: only the summary is wanted
                for one in self.members:
                    one.metrics = {
                        n: value for line in one.book.kept[-1:] for n, value in line.items() if n != "step"
                    }
            if start < self.config.train.steps:
                window = profile.Window(self.members[0].workdir, self.config.train.profile_steps)
                stack.callback(window.close)
                self.loop(state, start, window)

    def open(self, start: int) -> None:
        """Prints what this start of the first member is, before anything is compiled."""
        one = self.members[0]
        datasets = {"": one.train_data, "held out": one.val_data}
        datasets |= {f"val.{name}": dataset for name, dataset in one.val_sets.items()}
        said = opening.lines(
            one.config, one.workdir, start, self.mesh.shape, self.program, datasets, len(self.members)
        )
        rich.get_console().print("\n".join(said), highlight=False, markup=False, soft_wrap=True)

    def say_determinism(self) -> None:
        if jax.default_backend() == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
            log.info(
                "two runs may differ in the last bits here: for equal ones set XLA_FLAGS=%s", DETERMINISTIC
            )

    def choose(self, resume: str) -> int:
        """The step to start from, 0 for a new run: the newest that all members have a checkpoint of."""
        start = -1
        if processes.first():
            found = [checkpoint.choose(resume, one.saves) for one in self.members]
            common = set.intersection(*(set(one.saves.steps()) for one in self.members))
            start = max(common) if common and None not in found else -1
        start = processes.agree(start)
        if start == 0:
            workdir = self.members[0].workdir
            problem, fix = "holds an imported model, not a run", f"Use --config.init_from={workdir}."
            raise ConfigError("--workdir", str(workdir), problem, f"Give another. {fix}")
        for one in self.members if start > 0 else ():
            one.read_record(start)
        if start < 0 and self.config.init_from:
            init_from.check(self.config.init_from)
        return max(start, 0)

    def begin(self, start: int) -> State:
        """The state at step ``start``."""
        if start and start == self.begins:
            return self.next_stage(start)
        if start:
            states = [self.join(one.saves.restore(start, self.like)) for one in self.members]
            log.info("resumed from the checkpoint at step %d", start)
            return jax.tree.map(lambda *leaves: np.stack(leaves), *states) if self.several else states[0]
        keys = [jax.random.key(one.config.train.seed) for one in self.members]
        state = self.program.init(jax.numpy.stack(keys) if self.several else keys[0])
        if self.config.init_from:
            state = self.from_others(state)
        return state

    def next_stage(self, start: int) -> State:
        """The state that a stage begins with: the parameters of the one before, the rest new."""
        keys = [jax.random.key(one.config.train.seed) for one in self.members]
        state = self.program.init(jax.numpy.stack(keys) if self.several else keys[0])
        like = {"params": self.like["params"]}
        states = [
            self.join(self.apart(self.own(state, r)) | one.saves.restore(start, like))
            for r, one in enumerate(self.members)
        ]
        log.info("a stage begins after step %d: its optimiser and schedule are new", start)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *states) if self.several else states[0]

    def from_others(self, state: State) -> State:
        """``state`` with parameters of init_from."""
        loaded = [
            init_from.start(
                self.config.init_from,
                self.definition,
                self.own(state, r)["params"],
                one.workdir,
                one.train_data.tokenizer,
            )
            for r, one in enumerate(self.members)
        ]
        several = lambda: jax.tree.map(lambda *leaves: np.stack(leaves), *loaded)
        return state | {"params": several() if self.several else loaded[0]}

    def own(self, state: State, r: int) -> State:
        """The state of member ``r``."""
        return jax.tree.map(lambda leaf: leaf[r], state) if self.several else state

    def alive(self) -> list[tuple[int, Member]]:
        return [(r, one) for r, one in enumerate(self.members) if not one.failed]

    def loop(self, state: State, start: int, window: profile.Window) -> None:
        config, steps = self.config, self.config.train.steps
        run = self.compiled(state, start)
        if jax.process_count() == 1 and self.stop.asked():
            raise Stopped(f"stopped by {interrupt.reason(self.stop.asked())} before step {start + 1}")
        vote = interrupt.vote(self.mesh)
        self.clock = clock = Clock(config, self.mesh.size, len(self.members))
        batches = self.batches(start)
        behind: tuple[int, dict] | None = None  # dispatched, its metrics not read yet
        for step in range(start + 1, steps + 1):
            window.before(step, state)
            state, now = run(state, self.put(clock.next(batches)), *self.teacher)
            window.after(step, now, run)
            if behind:  # read one step late, so that the devices always have the next one queued
                self.settle(*behind)
                if due(behind[0], config.log.every_steps):
                    self.write(behind[0], clock.rates())
            behind = step, now
            asked = vote(self.stop.asked())
            pauses = self.members[0].pauses(step)
            if asked or pauses or any(one.watch.in_a_row >= config.train.max_skipped for one in self.members):
                self.settle(*behind)
                behind = None
                self.give_up(step, state)
                if not self.alive():
                    return
                rates = clock.rates()
                if asked and step < steps:
                    self.leave(step, state, rates, interrupt.reason(asked))
                if step == steps or due(step, config.checkpoint.every_steps):
                    self.save(step, state, rates)
                if pauses:
                    self.finish(step, state, rates)
                elif due(step, config.log.every_steps):
                    self.write(step, rates)
                clock.restart()

    def compiled(self, state: State, start: int) -> Callable:
        began, known = time.perf_counter(), len(programs.hits)
        batch = self.put(self.stacked([one.train_data.batch(start) for one in self.members]))
        executable = self.program.step.lower(state, batch, *self.teacher).compile()
        log.info("compiled the training step in %.1f s%s", time.perf_counter() - began, programs.said(known))
        return executable

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        for batches in zip(*(one.train_data.iterate(start) for one in self.members), strict=False):
            yield self.stacked(batches)

    def stacked(self, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return jax.tree.map(lambda *parts: np.stack(parts), *batches) if self.several else batches[0]

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if self.several:
            return jax.device_put(batch)
        return sharding.put_batch(batch, self.mesh, self.config.train.batch_size)

    def settle(self, step: int, metrics: dict[str, Any]) -> None:
        """Waits for ``step`` and hands each member its metrics."""
        host = jax.device_get({name: value for name, value in metrics.items() if name != NORMS})
        self.clock.tick()
        for r, one in self.alive():
            pick = lambda leaf, r=r: leaf[r] if self.several else leaf
            one.settle(step, jax.tree.map(pick, host | {NORMS: metrics[NORMS]}))

    def write(self, step: int, rates: Metrics) -> None:
        for _, one in self.alive():
            one.write(step, one.metrics | rates)

    def give_up(self, step: int, state: State) -> None:
        for r, one in self.alive():
            if one.watch.in_a_row > self.config.train.max_skipped:
                one.give_up(step, self.apart(self.own(state, r)))

    def leave(self, step: int, state: State, rates: Metrics, reason: str) -> NoReturn:
        """Saves after ``step`` and ends; a line that is due is left to the run that resumes."""
        self.save(step, state, rates)
        for _, one in self.alive():
            one.saves.wait()
        raise Stopped(f"stopped by {reason} with a complete checkpoint at step {step}")

    def save(self, step: int, state: State, rates: Metrics) -> None:
        for r, one in self.alive():
            one.save(step, self.apart(self.own(state, r)), rates)

    def finish(self, step: int, state: State, rates: Metrics) -> None:
        """Lets the members look at ``step``; they share the batches of a validation."""
        looks = self.validations(state)
        found: dict[str, list[Metrics]] = {}

        def measure(what: str, r: int) -> Metrics:
            if what not in found:
                found[what] = looks[what]()
            return found[what][r]

        for r, one in self.alive():
            own = {what: partial(measure, what, r) for what in looks}
            one.finish(step, self.own(state, r)["params"], own, rates)

    def validations(self, state: State) -> dict[str, Callable[[], list[Metrics]]]:
        """What is measured of each member: val_loss, val_accuracy, val_bpb; val/<name>/loss ... of each set
        of ``config.val``; with optimizer.ema, ema/val_loss ... of the averaged weights. Each by itself."""
        one = self.members[0]
        found: dict[str, Callable[[], list[Metrics]]] = {}
        weights = {"": state["params"]}
        if "ema" in state:
            weights["ema/"] = state["params"] | state["ema"]
        for start, params in weights.items():
            for name, dataset in {"": one.val_data, **one.val_sets}.items():
                what = f"{start}val/{name}" if name else f"{start}validation"
                found[what] = partial(self.validated, params, dataset, start, name)
        return found

    def validated(self, params: Any, dataset: Dataset, start: str = "", name: str = "") -> list[Metrics]:
        """The metrics of each member over the first held-out batches, the same every time; what is held out
        does not depend on the seed. RunError where the stored data are damaged."""
        dataset.verified()
        wanted = self.config.eval.batches
        count = min(wanted, dataset.num_batches or wanted)
        put = lambda i: sharding.put_batch(dataset.batch(i), self.mesh, dataset.batch_size)
        host = jax.device_get([self.program.evaluate(params, put(i), *self.teacher) for i in range(count)])
        value = lambda one, key, r: float(one[key][r] if self.several else one[key])
        called = lambda key: f"{start}val/{name}/{key.removeprefix('val_')}" if name else f"{start}{key}"
        each = [
            held_out({key: sum(value(one, key, r) for one in host) for key in host[0]})
            for r in range(len(self.members))
        ]
        return [{called(key): number for key, number in one.items()} for one in each]


def draw(member: Member) -> None:
    """loss.png, which no trained step may depend on."""
    with logbook.harmless("drawing loss.png"):
        records = logbook.read(member.workdir / "metrics.jsonl")
        size = f"{cost.parameters(member.config):,} parameters"
        title = f"{member.workdir.name}: {member.config.model.pattern}, {size}"
        last = next((r for r in reversed(records) if r.get("val_bpb")), None)
        nats = last["val_loss"] / last["val_bpb"] if last else 0.0  # of a token, for each bit of a byte
        levels = {name: nats * bits for name, bits in references(member).items()} if last else {}
        picture.plot(records, member.workdir / "loss.png", title, levels)


def references(member: Member) -> dict[str, float]:
    """Bits per byte of the held-out text without a model; nothing where tokens stand for no bytes."""
    text = member.val_data.held_out_bytes(member.config.eval.batches)
    if not text:
        return {}
    return {
        "gzip -9": baselines.gzip_bits_per_byte(text),
        "order-0 entropy": baselines.order0_bits_per_byte(text),
    }


def tell(member: Member) -> None:
    """Prints what the run came to: layers, held-out loss beside references, paths."""
    config, metrics = member.config, member.metrics
    console = rich.get_console()
    console.print(report.layer_table(config))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(report.full_layers(config))
    text = member.val_data.held_out_bytes(config.eval.batches)
    if "val_loss" in metrics:
        say(f"held-out loss: {metrics['val_loss']:.4f} nats per token")
    if text and "val_bpb" in metrics:
        say(f"held-out bits per byte, on the same {len(text):,} bytes:")
        say(f"  this model       {metrics['val_bpb']:.3f}")
        for name, bits in references(member).items():
            say(f"  {name:<16} {bits:.3f}")
    if "sample" in metrics:
        say(f"sample:\n{logbook.printable(metrics['sample'])}")
    say("written:")
    for name in ("metrics.jsonl", "loss.png", "config.json", "layers.json", "checkpoints"):
        say(private.hide(f"  {member.workdir / name}"))
