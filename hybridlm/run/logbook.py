"""What a run tells the world: metrics.jsonl, W&B, TensorBoard, a progress bar. Process 0 only.

metrics.jsonl is the record: one JSON object per logged step, ascending. W&B and TensorBoard get the same
numbers and can never fail the run. On resumption the file is cut back to the checkpoint's step, so the lines
that follow are those of a run that was never interrupted.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from hybridlm import untrusted
from hybridlm.config import Config
from hybridlm.errors import RunError
from hybridlm.run import show, tracking

log = logging.getLogger("hybridlm")

PLAIN_LINES = 20  # progress lines of a whole run when the output is no terminal
SHOWN = {  # metric -> its name and format there
    "loss": ("loss", ".4f"),
    "bits_per_byte": ("bits/byte", ".3f"),
    "val_loss": ("val loss", ".4f"),
    "val_bpb": ("val bits/byte", ".3f"),
    "val_accuracy": ("val accuracy", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "hfu": ("HFU", ".1%"),
}

Metrics = dict[str, Any]


def split(path: Path) -> tuple[list[tuple[bytes, Metrics]], dict[int, bytes]]:
    """The lines of ``path`` that are objects with a step, as they stand there and read; and the others.

    The others by their number from 1, without a last one cut short by a kill. A number that was not finite is
    null in the file, and missing from what is read.
    """
    good: list[tuple[bytes, Metrics]] = []
    damaged: dict[int, bytes] = {}
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = untrusted.parse(line)
            untrusted.check_shape(record, {"step": untrusted.NATURAL})
        except ValueError:
            if line.endswith(b"\n"):
                damaged[number] = line
            continue
        whole = line if line.endswith(b"\n") else line + b"\n"
        good.append((whole, {name: value for name, value in record.items() if value is not None}))
    return good, damaged


def read(path: Path) -> list[Metrics]:
    """The objects in ``path``, [] when it is missing; lines that are none are left out."""
    return [record for _, record in split(path)[0]]


def truncate(path: Path, step: int) -> list[Metrics]:
    """Drops every object after ``step`` from ``path``, in one atomic replacement; returns those that stay.

    Damaged lines are named and go to ``<name>.damaged`` beside it.
    """
    good, damaged = split(path)
    kept = [(line, record) for line, record in good if record["step"] <= step]
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        before = aside.read_bytes() if aside.exists() else b""
        untrusted.write_bytes(aside, before + b"".join(damaged.values()))
        numbers = ", ".join(map(str, list(damaged)[:10])) + (" ..." if len(damaged) > 10 else "")
        log.error("%s: damaged lines set aside in %s: %s", path, aside.name, numbers)
    if path.exists():
        if lost := len(good) - len(kept):
            log.info("%s: dropped %d lines after step %d, to be computed again", path, lost, step)
        untrusted.write_bytes(path, b"".join(line for line, _ in kept))
    return [record for _, record in kept]


def recordable(metrics: Mapping[str, Any]) -> tuple[Metrics, list[str]]:
    """``metrics`` as JSON has them, and the names of those that are not finite, which are None there.

    Other numbers than Python's become Python's, and whatever is neither number nor text its text.
    """
    values: Metrics = {}
    for name, value in metrics.items():
        try:
            plain = value if type(value) in (int, float, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            plain = str(value)
        if isinstance(plain, str):  # half a surrogate pair has no UTF-8
            plain = plain.encode("utf-8", "backslashreplace").decode()
        values[name] = None if isinstance(plain, float) and not math.isfinite(plain) else plain
    return values, [name for name, value in values.items() if value is None]


class Logbook:
    """Context manager around the train loop; on processes other than the first it writes and shows nothing.

    config: the whole config; ``log`` says where to, ``train.steps`` when it ends.
    start: the step resumed from; 0 for a new run.
    kept: the lines up to there.  last: the step of the newest of them.
    waiting: lines that the disk refused, in order; they are tried again with every next one.
    """

    def __init__(self, workdir: Path, config: Config, *, start: int):
        first = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl" if first else Path(os.devnull)
        self.bar = Bar(start, config.train.steps, quiet=not first)
        self.trackers = (
            tracking.Wandb(workdir, config, config.log.wandb_mode if first else "disabled"),
            tracking.Board(workdir, config.log.tensorboard and first, start),
        )
        self.kept = truncate(self.path, start) if first else []
        self.last = self.kept[-1]["step"] if self.kept else 0
        self.waiting: list[bytes] = []
        self.refused = ""

    def __enter__(self) -> "Logbook":
        self.file = self.path.open("ab", buffering=0)  # a line is on its way when `write` returns
        self.bar.open()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flush()
        self.bar.close()
        self.file.close()
        for tracker in self.trackers:
            tracker.close(failed=error is not None)
        if self.waiting:
            problem = f"{self.path}: {len(self.waiting)} lines could not be written: {self.refused}."
            log.error("%s", problem)
            if error is None:
                raise RunError(f"{problem} The checkpoints are complete.")

    def write(self, step: int, metrics: Mapping[str, Any]) -> str:
        """One line for ``step``, in the operating system's hands on return, or waiting if it refuses.

        metrics: `recordable`.  Returns why it refuses when it has just begun to, else "".
        """
        before = self.refused
        self.waiting.append(json.dumps({"step": step, **metrics}, allow_nan=False).encode() + b"\n")
        self._flush()
        known = {name: value for name, value in metrics.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, known)
        self.bar.show(step, known)
        return "" if before else self.refused

    def _flush(self) -> None:
        """Writes what waits, as far as the disk takes it; half a line is taken back."""
        while self.waiting:
            line, begin = self.waiting[0], 0
            try:
                begin = os.fstat(self.file.fileno()).st_size
                written = self.file.write(line)
                self.refused = "" if written == len(line) else "No space left on device"
            except OSError as error:
                self.refused = error.strerror or str(error)
            if self.refused:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.file.fileno(), begin)
                return
            del self.waiting[0]


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is said in the log: rich leaves by SystemExit when its reader is gone."""
    try:
        yield
    except tracking.NONE_OF_OURS as error:
        log.warning("%s failed, going on without it: %s", what, str(error) or type(error).__name__)


class Bar:
    """A rich progress bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, start: int, steps: int, quiet: bool):
        self.steps = steps
        self.console = Console(quiet=True) if quiet else rich.get_console()
        columns = (
            BarColumn(bar_width=6),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # The last of it is what few columns cut off.
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True)),
        )
        self.bar = Progress(*columns, console=self.console, expand=True)
        self.task = self.bar.add_task("train", total=steps, completed=start, numbers="compiling")
        self.plain_every = max(1, math.ceil(steps / PLAIN_LINES))
        self.next_plain = 0

    @harmless("opening the bar")
    def open(self) -> None:
        if self.console.is_terminal:
            self.bar.start()

    @harmless("closing the bar")
    def close(self) -> None:
        self.bar.stop()

    @harmless("showing")
    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The numbers of ``step``, where they can be shown: a reader that went away ends nothing."""
        known = {name: how for name, how in SHOWN.items() if name in metrics}
        if "val_bpb" in metrics:  # text, not a task
            known.pop("val_accuracy", None)
        parts = [] if "loss" in metrics else ["loss not finite"]
        numbers = "  ".join(
            parts + [f"{said} {metrics[name]:{form}}" for name, (said, form) in known.items()]
        )
        self.bar.update(self.task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step >= self.next_plain or "val_loss" in metrics):
            self.next_plain = step + self.plain_every
            left = f"{span((self.steps - step) * metrics.get('step_seconds', 0))} left"
            show.line(f"step {step}/{self.steps}  {numbers}  {left}", self.console)
        if "sample" in metrics and step < self.steps:  # the last one is for the summary
            show.line(metrics["sample"], self.console)


def span(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    longer = f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
    return longer if seconds >= 100 else f"{seconds:.0f} s"
