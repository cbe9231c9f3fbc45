"""Where a run's numbers go besides metrics.jsonl: Weights & Biases, TensorBoard.

Trackers can never fail the run: what fails in one is logged once and ends it.
"""

import contextlib
import importlib.util
import logging
import netrc
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from hybridlm import config as configs
from hybridlm import untrusted
from hybridlm.config import Config
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

FLUSH_SECONDS = 10.0
NONE_OF_OURS = (Exception, SystemExit)  # what others' code may end with, which ends no run

# W&B would record who ran the program where: command line, paths, host, account, git remote.
PRIVATE = {"x_disable_meta": True, "disable_git": True, "program": "train.py", "host": "host"}


class Tracker:
    """A kind starts inside `guarded`, and defines `send` and `end`.

    on: whether it has started and not failed since.
    """

    name: str
    on = False

    def send(self, step: int, metrics: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        raise NotImplementedError

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.on:
            with self.guarded(f"failed at step {step}"):
                self.send(step, metrics)

    def close(self, failed: bool = False) -> None:
        if self.on:
            with self.guarded("was not finished"):
                self.end(failed)

    @contextlib.contextmanager
    def guarded(self, problem: str) -> Iterator[None]:
        try:
            yield
        except NONE_OF_OURS as error:  # the network, the server, the account, the disk, the package
            self.on = False
            said = str(error) or type(error).__name__
            log.warning("%s %s, going on without it: %s", self.name, problem, said)


class Wandb(Tracker):
    """Weights & Biases, or nothing."""

    name = "W&B"

    def __init__(self, workdir: Path, config: Config, mode: Literal["online", "offline", "disabled"]):
        if mode == "disabled":
            return
        with self.guarded("did not start"):
            if mode == "online" and not has_key():
                log.warning("no W&B key found (`wandb login`): logging offline, for `wandb sync` later")
                mode = "offline"
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
            self.on = True

    def send(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.run.log(dict(metrics), step=step)

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def run_id(workdir: Path) -> str:
    """The W&B id of the run in ``workdir``, the same after a resumption."""
    path = workdir / "wandb_id"
    known = path.read_bytes() if path.exists() else b""
    if not re.fullmatch(rb"[0-9a-z]{1,64}", known):  # none yet, or damaged
        known = secrets.token_hex(4).encode()
        untrusted.write_bytes(path, known)
    return known.decode()


def has_key() -> bool:
    """Whether W&B would find credentials: an environment variable, or an entry for its host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def check_tensorboard(wanted: bool) -> None:
    """ConfigError if it is wanted and cannot be had."""
    if wanted and importlib.util.find_spec("tensorboardX") is None:
        fix = "pip install 'hybridlm[tensorboard]', or leave it off."
        raise ConfigError("log.tensorboard", wanted, "needs tensorboardX, which is not installed", fix)


class Board(Tracker):
    """TensorBoard's event file of one start of a run, in `tensorboard/` of the workdir: the numbers and
    samples of metrics.jsonl. ``wanted`` False writes nothing and imports nothing.

    start: the step resumed from; 0 for a new run. A resumption begins another file, which tells TensorBoard
        to forget what came after the checkpoint.

    Written as they come, without tensorboardX's thread (its queue would stop the run once a full disk has
    ended that) and without its file names, which hold the host's.
    """

    name = "TensorBoard"

    def __init__(self, workdir: Path, wanted: bool, start: int):
        if not wanted:
            return
        with self.guarded("did not start"):
            from tensorboardX import summary
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter

            self.summary, self.event = summary, event_pb2.Event
            folder = workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self.writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
            self._write(file_version="brain.Event:2")
            begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=start + 1, session_log=begins)
            self._flush()
            self.on = True

    def send(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            make = self.summary.text if isinstance(value, str) else self.summary.scalar
            self._write(step=step, summary=make(name, value))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def end(self, failed: bool) -> None:
        self.writer.flush()
        self.writer.close()

    def _write(self, **fields: Any) -> None:
        self.writer.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self.writer.flush()
        self.flushed = time.monotonic()
