"""The loop around one jitted step, and everything that may happen between two steps.

The whole state of a run is {"params", "opt_state", "step"} and, if it is wanted, "ema"; the batch of a step
is a function of the seed and the step, and there is no other randomness. A run that was killed and resumed
therefore writes the same metrics as one that was not.

Save first, then look: the checkpoint of a step is begun before the step is validated, sampled or plotted.
"""

import contextvars
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, NoReturn

import jax
import numpy as np
import rich
from jax.sharding import Mesh

from hybridlm import fit, init_from, lent, opening, program, recomputation, report, sharding
from hybridlm.config import Config
from hybridlm.data import Dataset, overlap
from hybridlm.errors import ConfigError, Stopped
from hybridlm.member import Member, Metrics, due, held_out
from hybridlm.model import Definition
from hybridlm.program import NORMS, State
from hybridlm.run import checkpoint, interrupt, logbook, processes, profile, programs, show
from hybridlm.run.clock import Clock, Running

log = logging.getLogger("hybridlm")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # on a CPU the bits are the same anyway


class Loop:
    """One start of the members, from choosing where to begin to the last step."""

    def __init__(self, members: Sequence[Member], mesh: Mesh, stop: interrupt.Stop):
        self.members, self.mesh, self.stop = members, mesh, stop
        self.config, self.definition = members[0].config, members[0].definition
        self.several = len(members) > 1
        rates = [one.config.optimizer.learning_rate for one in members] if self.several else None
        bytes_of = members[0].train_data.token_bytes
        self.begins = members[0].stage_begin
        self.lent = frozenset() if self.several else lent.names(members[0].parts())
        self.build = lambda config, definition: program.build(
            config, definition, mesh, bytes_of, rates, self.begins, self.lent
        )
        self.program = self.build(self.config, self.definition)
        self.teacher: tuple[Any, ...] = ()
        self.again = 0.0  # FLOPs that the step computes a second time
        self.apart, self.join, self.like = program.by_layer(self.definition, self.program)

    def train(self, resume: str) -> None:
        start = self.choose(resume)
        if start > self.config.train.steps:  # in a later stage
            return
        if start < self.config.train.steps:
            for member in self.members:
                member.check_teacher()
            self.find_microbatches(start)
        if processes.first():
            self.open(start)
        self.say_determinism()
        self.teacher = init_from.teacher(self.config, self.program)
        ready = self.beginning(start)
        with ExitStack() as stack:
            for member in self.members:
                member.begin(stack, start)
            owed = any("unwritten" in one.saved and one.book.last < start for one in self.members)
            if processes.agree(int(owed)):  # the run ended before this step's line was complete
                for one in self.members:
                    one.metrics = one.saved["unwritten"]
                self.finish(start, ready(), {})
            elif start == self.config.train.steps:  # finished before: only the summary is wanted
                for one in self.members:
                    one.metrics = {
                        n: value for line in one.book.kept[-1:] for n, value in line.items() if n != "step"
                    }
            if start < self.config.train.steps:
                window = profile.Window(self.members[0].workdir, self.config.train.profile_steps)
                stack.callback(window.close)
                with fit.outgrown(lambda: self.config, self.mesh, len(self.members)):
                    self.loop(ready, start, window)

    @logbook.harmless("saying what the run is")
    def open(self, start: int) -> None:
        """Prints what this start of the first member is, and its layers, before anything is compiled."""
        parts, runs = self.config.train.parts, len(self.members)
        said = opening.lines(self.members[0], start, self.mesh.shape, self.program, parts, runs)
        show.line("\n".join(said))
        rich.print(report.layer_table(self.config))
        one = self.members[0]
        if start == one.stage_begin > 0:
            return  # said when the run began
        for name, held in one.held_out().items():
            if why := overlap.warning(one.train_data.source, held.source, name):
                log.warning("%s", why)

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
            init_from.described(self.config.init_from)  # refuses what is none
        return max(start, 0)

    def beginning(self, start: int) -> Callable[[], State]:
        """What waits for `begin`'s state, made or read while the step is traced.

        With several processes it is there at once: they come in one order to what they do together.
        """
        if jax.process_count() > 1:
            state = self.checked(start)
            return lambda: state

        def begin() -> State:
            with jax.set_mesh(self.mesh):  # which is a thread's own
                return self.checked(start)

        maker = ThreadPoolExecutor(1, "state")
        made = maker.submit(contextvars.copy_context().run, begin)
        maker.shutdown(wait=False)
        return made.result

    def checked(self, start: int) -> State:
        """`begin`; of a run that goes on, what the teacher borrows is the teacher's."""
        state = self.begin(start)
        if 0 < start < self.config.train.steps:
            teacher = self.members[0].teacher
            lent.check(self.lent, teacher, self.definition, state["params"])
        return state

    def begin(self, start: int) -> State:
        """The state at step ``start``: where a stage begins, parameters of the one before, the rest new."""
        if start and start != self.begins:
            states = [self.join(one.saves.restore(start, self.like)) for one in self.members]
            log.info("resumed from the checkpoint at step %d", start)
            return self.stacked(states)
        state = self.program.init(self.keys())
        if start:
            like = {"params": self.like["params"]}
            states = [
                self.join(self.apart(self.own(state, r)) | one.saves.restore(start, like))
                for r, one in enumerate(self.members)
            ]
            log.info("a stage begins after step %d: its optimiser and schedule are new", start)
            return self.stacked(states)
        return self.from_others(state) if self.config.init_from else state

    def from_others(self, state: State) -> State:
        """``state`` with parameters of init_from."""
        gates, loaded = self.config.init_gates, []
        for r, one in enumerate(self.members):
            fresh, tokens = self.own(state, r)["params"], one.train_data.tokenizer
            path = self.config.init_from
            loaded += [init_from.start(path, self.definition, fresh, one.workdir, tokens, gates)]
        return state | {"params": self.stacked(loaded)}

    def keys(self) -> jax.Array:
        """What `Program.init` is given."""
        keys = [jax.random.key(one.config.train.seed) for one in self.members]
        return jax.numpy.stack(keys) if self.several else keys[0]

    def own(self, whole: dict[str, Any], r: int) -> dict[str, Any]:
        """What of a state or of metrics is member ``r``'s."""
        return jax.tree.map(lambda leaf: leaf[r], whole) if self.several else whole

    def alive(self) -> list[tuple[int, Member]]:
        return [(r, one) for r, one in enumerate(self.members) if not one.failed]

    def loop(self, ready: Callable[[], State], start: int, window: profile.Window) -> None:
        config, steps = self.config, self.config.train.steps
        run, state = self.compiled(ready, start), ready()
        if jax.process_count() == 1 and self.stop.asked():
            raise Stopped(f"stopped by {interrupt.reason(self.stop.asked())} before step {start + 1}")
        vote = interrupt.vote(self.mesh)
        self.clock = clock = Clock(config, self.mesh.size, len(self.members), self.again)
        each = (one.train_data.iterate(start) for one in self.members)
        batches = map(self.stacked, zip(*each, strict=False))
        behind: tuple[int, dict, Running] | None = None  # dispatched, its metrics not read yet
        for step in range(start + 1, steps + 1):
            window.before(step, state)
            state, now = run(state, self.put(clock.next(batches)), *self.teacher)
            window.after(step, now, run)
            if behind:  # read one step late, so that the devices always have the next one queued
                self.settle(*behind)
                if due(behind[0], config.log.every_steps):
                    self.write(behind[0], clock.rates())
            behind = step, now, clock.watch(now)
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

    def find_microbatches(self, start: int) -> None:
        """Finds the number that train.microbatches = 0 stands for, before it is said what runs."""
        if self.config.train.microbatches:
            return
        shapes = jax.eval_shape(self.program.init, self.keys()) if self.several else self.program.shapes
        batch = self.batch(start)

        def trace(config: Config, definition: Definition) -> Any:
            return self.build(config, definition).step.trace(shapes, batch, *self.program.teacher)

        available, runs = fit.limit(), len(self.members)
        self.config = fit.parted(self.config, self.definition, self.mesh, trace, available, runs)

    def compiled(self, ready: Callable[[], State], start: int) -> Callable:
        began, known = time.perf_counter(), len(programs.hits)
        batch = self.batch(start)
        shapes = ready() if self.several else self.program.shapes

        def trace(definition: Definition) -> Any:
            built = self.program if definition is self.definition else self.build(self.config, definition)
            found = built.step.trace(shapes, batch, *self.teacher)
            # The last that is traced is the one that runs.
            self.again = recomputation.flops(found.jaxpr.jaxpr, self.config, len(self.members))
            return found

        executable = fit.step(self.config, self.definition, self.mesh, trace, ready, len(self.members))
        log.info("compiled the training step in %.1f s%s", time.perf_counter() - began, programs.said(known))
        return executable

    def batch(self, start: int) -> Any:
        """What the step after step ``start`` is given."""
        return self.put(self.stacked([one.train_data.batch(start) for one in self.members]))

    def stacked(self, ofs: Sequence[Any]) -> Any:
        """What each member has, as the program takes it."""
        return jax.tree.map(lambda *parts: np.stack(parts), *ofs) if self.several else ofs[0]

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if self.several:
            return jax.device_put(batch)
        return sharding.put_batch(batch, self.mesh, self.config.train.batch_size)

    def settle(self, step: int, metrics: dict[str, Any], running: Running) -> None:
        """Waits for ``step`` and hands each member its metrics."""
        host = jax.device_get({name: value for name, value in metrics.items() if name != NORMS})
        self.clock.tick(running)
        for r, one in self.alive():
            one.settle(step, self.own(host | {NORMS: metrics[NORMS]}, r))

    def write(self, step: int, rates: Metrics) -> None:
        for _, one in self.alive():
            one.write(step, one.metrics | rates)

    def give_up(self, step: int, state: State) -> None:
        for r, one in self.alive():
            if one.watch.in_a_row > self.config.train.max_skipped:
                one.give_up(step, self.apart(self.own(state, r)), self.config.train.microbatches)

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
        looks = {what: cache(look) for what, look in self.validations(state).items()}
        for r, one in self.alive():
            own = {what: lambda look=look, r=r: look()[r] for what, look in looks.items()}
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
        sums = {key: sum(np.asarray(one[key], np.float64) for one in host) for key in host[0]}
        called = lambda key: f"{start}val/{name}/{key.removeprefix('val_')}" if name else f"{start}{key}"
        each = [held_out(self.own(sums, r)) for r in range(len(self.members))]
        return [{called(key): float(number) for key, number in one.items()} for one in each]
