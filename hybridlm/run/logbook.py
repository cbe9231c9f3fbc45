"""What a run tells the world: metrics.jsonl, Weights & Biases, a progress bar. Process 0 only.

metrics.jsonl is the record: one JSON object per logged step, ascending. W&B gets the same numbers and can
never fail the run. On resumption the file is cut back to the checkpoint's step, so the lines that follow are
those of a run that was never interrupted.
"""

import json
import logging
import math
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

import jax
import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybridlm import config as configs
from hybridlm.config import Config
from hybridlm.errors import RunError

log = logging.getLogger("hybridlm")

PLAIN_LINES = 20  # progress lines of a whole run when the output is no terminal

# W&B would record who ran the program where: command line, paths, host, account, git remote.
PRIVATE = {"x_disable_meta": True, "disable_git": True, "program": "train.py", "host": "host"}

Metrics = dict[str, Any]


def read(path: Path) -> list[Metrics]:
    """The objects in ``path``, [] when it is missing; reading ends at the first line cut short by a kill."""
    records: list[Metrics] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def truncate(path: Path, step: int) -> list[Metrics]:
    """Drops every object after ``step`` from ``path``, in one atomic replacement; returns those that stay."""
    records = read(path)
    kept = [record for record in records if record["step"] <= step]
    if path.exists():
        if len(kept) < len(records):
            log.info(
                "%s: dropped %d lines after step %d, to be computed again",
                path,
                len(records) - len(kept),
                step,
            )
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(whole, path)
    return kept


class Logbook:
    """Context manager around the train loop; on processes other than the first it writes and shows nothing.

    config: the whole config; ``log`` says where to, ``train.steps`` when it ends.
    start: the step resumed from; 0 for a new run.
    kept: the lines up to there.  last: the step of the newest of them.
    """

    def __init__(self, workdir: Path, config: Config, *, start: int):
        first = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl" if first else Path(os.devnull)
        self.bar = Bar(start, config.train.steps, quiet=not first)
        self.tracker = Tracker(workdir, config, "disabled" if not first else config.log.wandb_mode)
        self.kept = truncate(self.path, start) if first else []
        self.last = self.kept[-1]["step"] if self.kept else 0

    def __enter__(self) -> "Logbook":
        self.file = self.path.open("ab", buffering=0)  # a line is on its way when `write` returns
        self.bar.open()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self.file.close()
        self.tracker.close(failed=error is not None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line for ``step``, in the operating system's hands on return; RunError when it refuses."""
        line = json.dumps({"step": step, **metrics}, allow_nan=False).encode() + b"\n"
        try:
            written = self.file.write(line)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written at step {step}: {error.strerror}.") from error
        if written != len(line):
            need = f"{len(line):,} bytes did not fit"
            raise RunError(f"{self.path}: cannot be written at step {step}: the disk is full ({need}).")
        self.tracker.log(step, metrics)
        self.bar.show(step, metrics)


class Bar:
    """A rich progress bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, start: int, steps: int, quiet: bool):
        self.steps = steps
        self.console = Console(quiet=True) if quiet else rich.get_console()
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("train", total=steps, completed=start, numbers="compiling")
        self.plain_every = max(1, math.ceil(steps / PLAIN_LINES))
        self.next_plain = 0

    def open(self) -> None:
        if self.console.is_terminal:
            self.bar.start()

    def close(self) -> None:
        self.bar.stop()

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        tokens_alone = "val_accuracy" in metrics and "val_bpb" not in metrics  # a task, not text
        parts = {
            "loss": f"{metrics['loss']:.4f}" if "loss" in metrics else "not finite",
            "bits/byte": f"{metrics['bits_per_byte']:.3f}" if "bits_per_byte" in metrics else "",
            "val loss": f"{metrics['val_loss']:.4f}" if "val_loss" in metrics else "",
            "val bits/byte": f"{metrics['val_bpb']:.3f}" if "val_bpb" in metrics else "",
            "val accuracy": f"{metrics['val_accuracy']:.3f}" if tokens_alone else "",
            "tokens/s": f"{metrics['tokens_per_second']:,.0f}",
            "MFU": f"{metrics['mfu']:.1%}" if "mfu" in metrics else "",
        }
        numbers = "  ".join(f"{name} {value}" for name, value in parts.items() if value)
        self.bar.update(self.task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step >= self.next_plain or "val_loss" in metrics):
            self.next_plain = step + self.plain_every
            left = f"{span((self.steps - step) * metrics['step_seconds'])} left"
            self.say(f"step {step}/{self.steps}  {numbers}  {left}")
        if "sample" in metrics and step < self.steps:  # the last one is for the summary
            self.say(printable(metrics["sample"]))

    def say(self, text: str) -> None:
        """Prints ``text`` as it is, above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Tracker:
    """Weights & Biases, or nothing. Any failure of it is logged once and ends tracking, never the run."""

    def __init__(self, workdir: Path, config: Config, mode: Literal["online", "offline", "disabled"]):
        self.run: Any = None
        if mode == "disabled":
            return
        if mode == "online" and not has_key():
            log.warning("no W&B key found (`wandb login`): logging offline, for `wandb sync` later")
            mode = "offline"
        try:
            import wandb  # slow to import, so only where it is used

            self.run = wandb.init(
                project=config.log.project,
                name=config.log.name or workdir.name,
                config=configs.portable(config),
                dir=workdir,
                mode=mode,
                id=run_id(workdir),
                resume="allow",
                settings=wandb.Settings(silent=mode == "offline", console="off", **PRIVATE),
            )
        except (
            Exception
        ) as error:  # the network, the server, the account, the package: none of it is the run's
            log.warning("W&B did not start, going on without it: %s", error)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.run is None:
            return
        try:
            self.run.log(dict(metrics), step=step)
        except Exception as error:
            log.warning("W&B failed at step %d, going on without it: %s", step, error)
            self.run = None

    def close(self, failed: bool) -> None:
        if self.run is not None:
            try:
                self.run.finish(exit_code=int(failed))
            except Exception as error:
                log.warning("W&B did not finish cleanly: %s", error)


def run_id(workdir: Path) -> str:
    """The W&B id of the run in ``workdir``, the same after a resumption."""
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def has_key() -> bool:
    """Whether W&B would find credentials: an environment variable, or an entry for its host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: a model can write any character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def span(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    longer = f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
    return longer if seconds >= 100 else f"{seconds:.0f} s"
