"""TensorBoard's event files, in `tensorboard/` of the workdir: the numbers and samples of metrics.jsonl.

Written as they come, without tensorboardX's thread (its queue would stop the run once a full disk has ended
that) and without its file names, which hold the host's. A resumption begins another file that tells
TensorBoard to forget what came after the checkpoint. Any failure is logged once and ends it, never the run.
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.run.tracking import Tracker

FLUSH_SECONDS = 10.0


def check(wanted: bool) -> None:
    """ConfigError if it is wanted and cannot be had."""
    if wanted and importlib.util.find_spec("tensorboardX") is None:
        fix = "pip install 'hybridlm[tensorboard]', or leave it off."
        raise ConfigError("log.tensorboard", wanted, "needs tensorboardX, which is not installed", fix)


class Board(Tracker):
    """The event file of one start of a run; ``wanted`` False writes nothing and imports nothing.

    start: the step resumed from; 0 for a new run.
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
