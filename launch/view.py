"""What is seen while a sweep runs: a live table on a terminal, a line for each change elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hybridlm.run import private, show
from hybridlm.run.logbook import SHOWN
from launch.grid import Run
from launch.local import Job
from launch.state import Status, number, status

PLAIN_SECONDS = 30.0  # between lines on what runs, when the output is no terminal


class View:
    """`show` is what `local.run_all` calls.  live: a context manager, to be open meanwhile."""

    def __init__(self, runs: Sequence[Run], workdir: Path, console: Console):
        self.runs, self.workdir, self.console = list(runs), workdir, console
        self.states = {run.name: self.status(run) for run in runs}
        terminal = console.is_terminal
        self.live = Live(console=console, refresh_per_second=2, transient=True) if terminal else None
        self.began, self.at_start, self.spoke = time.monotonic(), self.work_done(), 0.0

    def status(self, run: Run, running: bool = False) -> Status:
        return status(self.workdir / run.name, run.config.train.steps, running)

    def show(self, running: Sequence[Job], waiting: Sequence[Job]) -> None:
        active = {run.name for job in running for run in job.runs}
        for run in self.runs:
            before = self.states[run.name]
            if before.state == "finished":
                continue
            now = self.states[run.name] = self.status(run, run.name in active)
            if now.state != before.state:
                self.say(f"{now.state:<9} {run.name}{_result(now)}")
        shown = [run for run in self.runs if self.states[run.name].state == "running"]
        if self.live:
            self.live.update(Group(self.table(shown), Text(self.summary())))
        elif time.monotonic() - self.spoke > PLAIN_SECONDS:
            self.spoke = time.monotonic()
            for run in shown:
                last = self.states[run.name].last
                if last:
                    shown_loss = _shown(last, "loss", ".4f")
                    self.say(f"  {run.name}: step {last['step']}/{run.config.train.steps}  loss {shown_loss}")
            self.say(self.summary())

    def table(self, shown: Sequence[Run]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("run", "progress", "step", "loss", "tokens/s"):
            justify: Any = "left" if column in ("run", "progress") else "right"
            table.add_column(column, justify=justify, no_wrap=True)
        for run in shown:
            last, steps = self.states[run.name].last, run.config.train.steps
            step = last.get("step", 0)
            numbers = ["starting", ""]
            if last:
                together = number(last, "packed") or 1
                whose = f" of {together:.0f} together" if together > 1 else ""
                numbers = [_shown(last, "loss", ".4f"), _shown(last, "tokens_per_second", ",.0f") + whose]
            table.add_row(Text(run.name), ProgressBar(steps, step, width=24), f"{step}/{steps}", *numbers)
        return table

    def summary(self) -> str:
        states = [one.state for one in self.states.values()]
        counts = {state: states.count(state) for state in ("finished", "running", "queued", "failed")}
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count) + self.time_left()

    def work_done(self) -> float:
        """Training steps of all runs so far, each as a share of its own."""
        return sum(
            min(1.0, one.last.get("step", 0) / run.config.train.steps)
            for run, one in zip(self.runs, self.states.values(), strict=True)
        )

    def time_left(self) -> str:
        """At the rate since this command started; nothing until there is one."""
        done = self.work_done() - self.at_start
        left = sum(one.state != "failed" for one in self.states.values()) - self.work_done()
        if done <= 0 or left <= 0:
            return ""
        minutes = (time.monotonic() - self.began) / done * left / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"

    def say(self, text: str) -> None:
        show.line(private.shown(text), self.console)


def _shown(line: dict[str, Any], name: str, form: str) -> str:
    value = number(line, name)
    return "not finite" if value is None else format(value, form)


def _result(now: Status) -> str:
    if now.state == "failed":
        return f": {now.error}"
    if now.state == "finished":
        names = [name for name in ("val_accuracy", "val_loss", "val_bpb") if name in now.last]
        return ": " + ", ".join(f"{SHOWN[name][0]} {_shown(now.last, name, '.4f')}" for name in names)
    return ""
