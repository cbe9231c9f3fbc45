"""A window of steps under JAX's profiler (train.profile_steps), and a table of where their time went.

In ``profile/`` of the workdir: `steps-10-12.txt`, and the trace itself for TensorBoard's profile plugin or
xprof. Process 0 only, and of several devices the first. Whatever fails is said in the log, and costs no step.
"""

import collections
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hybridlm import untrusted
from hybridlm.run import logbook

log = logging.getLogger("hybridlm")

TOP = 25  # ops in the table
WAITS = re.compile(r"(while|call|conditional|async)\b")  # whose time is that of the ops inside
OP_NAME = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
PHASES = {"recomputed": "rematted_computation", "backward": "transpose(", "forward": "jvp("}  # in op names
HOW = "self time of ops in milliseconds a step, on {where}; an op has the name of what XLA fused it around"


class Op(NamedTuple):
    """times: that it ran.  ms: in all."""

    name: str
    times: int
    ms: float


class Window:
    """Profiles the steps from ``steps[0]`` to ``steps[1]``, counted from 1; () profiles nothing."""

    def __init__(self, workdir: Path, steps: Sequence[int]):
        self.steps = tuple(steps) if jax.process_index() == 0 else ()
        self.folder = workdir / "profile"
        self.scratch: tempfile.TemporaryDirectory | None = None  # while it watches

    def before(self, step: int, state: Any) -> None:
        """Starts with the first of the steps, when ``state`` is there, of the step before.

        A run that is resumed among them profiles none.
        """
        if self.steps and step == self.steps[0]:
            with logbook.harmless("profiling"):
                jax.block_until_ready(state)
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # it would slow down what it measures
                scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
                jax.profiler.start_trace(scratch.name, profiler_options=options)
                self.scratch = scratch

    def after(self, step: int, result: Any, executable: Any) -> None:
        """Ends with the last of the steps, when ``result`` is there. executable: says what ops stand for."""
        if self.scratch is not None and step == self.steps[1]:
            with logbook.harmless("profiling"):
                jax.block_until_ready(result)
            self.close(executable)

    def close(self, executable: Any = None) -> None:
        """Ends the window; without ``executable`` it is the run that ended in it, and nothing is kept."""
        scratch, self.scratch = self.scratch, None
        if scratch is not None:
            with logbook.harmless("profiling"), scratch:
                jax.profiler.stop_trace()
                if executable is not None:
                    self._keep(Path(scratch.name), executable.as_text())

    def _keep(self, scratch: Path, hlo: str) -> None:
        [trace] = scratch.rglob("*.xplane.pb")
        name = "steps-{}-{}".format(*self.steps)
        where, ops = read(trace)
        text = table(ops, self.steps[1] - self.steps[0] + 1, where, dict(OP_NAME.findall(hlo)))
        kept = self.folder / "plugins" / "profile" / name
        kept.mkdir(parents=True, exist_ok=True)
        shutil.move(trace, kept / "local.xplane.pb")
        untrusted.write_text(self.folder / f"{name}.txt", text)
        log.info("profile of steps %d to %d: %s", *self.steps, self.folder / f"{name}.txt")


def read(trace: Path) -> tuple[str, list[Op]]:
    """(where the ops ran, the ops, longest first) of the XSpace file ``trace``.

    The first device's; on a CPU, where ops run on the threads of the host, those of all of them.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    device = next((p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name), None)
    plane = device or next(p for p in planes if p.name == "/host:CPU")
    lines = list(plane.lines)
    if device is not None:
        ops = [line for line in lines if line.name == "XLA Ops"]  # a TPU's; a GPU has streams of kernels
        lines = ops or [line for line in lines if line.name.startswith("Stream")]
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for line in lines:
        events = []
        for event in line.events:
            op = dict(event.stats).get("hlo_op", event.name if device is not None else None)
            if op is not None:
                events.append((float(event.start_ns), float(event.duration_ns), str(op)))
        for name, ns in self_times(events):
            if not WAITS.match(name):
                spent[name].append(ns / 1e6)
    found = [Op(name, len(ms), sum(ms)) for name, ms in spent.items()]
    return plane.name.strip("/"), sorted(found, key=lambda op: -op.ms)


def self_times(events: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """(name, duration less that of the events inside) of (start, duration, name) on one thread or stream."""
    found: list[list[Any]] = []
    open_: list[tuple[float, list[Any]]] = []
    for start, duration, name in sorted(events, key=lambda one: (one[0], -one[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            open_[-1][1][1] -= duration
        found.append([name, duration])
        open_.append((start + duration, found[-1]))
    return [(name, max(0.0, ns)) for name, ns in found]


def table(ops: Sequence[Op], steps: int, where: str, names: Mapping[str, str]) -> str:
    """Phases, primitives and the longest ops, each with its milliseconds and share of a step.

    names: XLA's name of an op -> JAX's, "jit(step)/jvp()/while/body/dot_general".
    """
    total = sum(op.ms for op in ops) or 1.0
    phases: dict[str, float] = collections.defaultdict(float)
    kinds: dict[str, float] = collections.defaultdict(float)
    for op in ops:
        full = names.get(op.name, "")
        phase = next((phase for phase, part in PHASES.items() if part in full), "update and others")
        phases[phase if full else "unnamed"] += op.ms
        kinds[full.rpartition("/")[2] if full else op.name.partition(".")[0]] += op.ms
    line = lambda ms, text: f"{ms / steps:10.3f} {ms / total:6.1%}  {text}"
    ranked = lambda groups: [line(ms, name) for name, ms in sorted(groups.items(), key=lambda g: -g[1])][:TOP]
    longest = [
        line(op.ms, f"{op.times / steps:7.1f} x {op.name:<40} {names.get(op.name, '')}".rstrip())
        for op in ops[:TOP]
    ]
    title = f"{total / steps:.3f} ms a step: " + HOW.format(where=where)
    parts = {
        "phase": ranked(phases),
        "primitive": ranked(kinds),
        "times a step, op, what it stands for": longest,
    }
    body = "\n\n".join(f"        ms  share  {name}\n" + "\n".join(rows) for name, rows in parts.items())
    return f"{title}\n\n{body}\n"
