"""What lies in a run's folder: whether it is finished, and what a report needs of it. Writes nothing.

A run is finished when metrics.jsonl has its last step and the checkpoint of that step is sealed, failed when
it has an error.txt. There is no other state, so a sweep that was killed goes on from what lies on the disk,
and folders can be copied together from several machines.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm import untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import logbook, private, seal

POINT, ERROR, LOG, MACHINE = "point.json", "error.txt", "log.txt", "machine.json"
TAIL_BYTES = 1 << 16  # of a text, for its last line


class Status(NamedTuple):
    """state: queued, running, finished or failed.  last: line of metrics.jsonl.  error: last line of it."""

    state: str
    last: dict[str, Any]
    error: str


def status(folder: Path, steps: int, running: bool = False, sealed_runs: bool = True) -> Status:
    """Of the run of ``steps`` steps in ``folder``.

    running: a process trains it.  sealed_runs: False for a study that keeps metrics and no checkpoints.
    """
    try:
        last = (lines(folder) or [{}])[-1]
    except ConfigError as error:
        return Status("running" if running else "failed", {}, private.shown(str(error)))
    if last.get("step", 0) >= steps and (not sealed_runs or sealed(folder / "checkpoints" / str(steps))):
        return Status("finished", last, "")
    if running:
        return Status("running", last, "")
    if (folder / ERROR).is_file():
        return Status("failed", last, last_line(folder, ERROR) or "no message")
    return Status("queued", last, "")


def sealed(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` has its name and its seal, and every file that the seal lists.

    Their sums are compared by who reads them (`seal.damage`), not here: this is asked twice a second.
    """
    try:
        names = seal.listed(checkpoint)
        return bool(names) and all(own(checkpoint, name).is_file() for name in names)
    except (OSError, ConfigError):
        return False


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are ones, in order; ConfigError for a file that cannot be read."""
    path = own(folder, "metrics.jsonl")
    try:
        return [line for line in logbook.read(path) if line["step"] > 0]
    except OSError as error:
        raise ConfigError("metrics.jsonl", path.parent.name, f"cannot be read ({error})") from error


def number(line: dict[str, Any], name: str) -> float | None:
    """A finite number of a line; None for anything else."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def starts(folder: Path) -> list[dict[str, Any]]:
    """What `launch.worker` noted at each start of the run (`launch.machine`); [] for a run without notes."""
    if not (folder / MACHINE).is_file():
        return []
    try:
        return untrusted.read_json(own(folder, MACHINE), MACHINE, {"starts": [{str: object}]})["starts"]
    except ConfigError:
        return []  # only the notes are lost


def own(folder: Path, name: str) -> Path:
    """``folder``/name, ConfigError where that is a link to somewhere else: a copied run may hold any link."""
    return untrusted.inside(folder, name, name)


def last_line(folder: Path, name: str) -> str:
    """The last line that is not empty of a text in ``folder``, as it may be shown; "" where there is none."""
    try:
        path = own(folder, name)
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            found = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except ConfigError as error:
        return private.shown(str(error))
    except OSError:
        return ""
    return private.shown(([line for line in found if line] or [""])[-1])
