"""Whether a checkpoint is what it should be: where it may lie, what was written, what its name says.

Knows the files of Orbax's checkpoints, and opens none with it.
"""

import errno
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import tensorstore

from hybridlm import untrusted
from hybridlm.errors import ConfigError, RunError, first_line
from hybridlm.run import seal

log = logging.getLogger("hybridlm")

ITEMS = ("params", "opt_state", "step", "run")  # of a training state
COMMITTED = "commit_success.txt"  # to Orbax a directory without it is no checkpoint
HALF_WRITTEN = "*.orbax-checkpoint-tmp*"


def check_place(directory: Path) -> None:
    """ConfigError for a place whose checkpoints could not be read again: Orbax takes its name for a pattern,
    and tensorstore for an address."""
    text = str(directory.resolve())
    odd = [character for character in "*?[\\\0" if character in text]
    odd += ["gs:"] if re.search(r"(^|/)gs:(/|$)", text) else []
    odd += ["bytes that are no UTF-8"] if re.search("[\ud800-\udfff]", text) else []
    if odd:
        problem = f"no checkpoint can be kept below a path with {' and '.join(odd)}"
        raise ConfigError("--workdir", str(directory.parent), problem, "Give another --workdir.")


def prove(path: Path, names: dict[str, set[str]]) -> None:
    """Reads back what was written to ``path``: every array's name, and the step. RunError if that fails.

    names: of the arrays of each item.  The sums that follow are taken of the same files.
    """
    for item, wanted in names.items():
        if lost := sorted(wanted - set(_arrays(path / item))):
            raise RunError(f"{path}: written, but cannot be read back: {item} has no {', '.join(lost[:3])}.")
        if len(wanted) == 1:
            _read_array(path / item, min(wanted))


def read_record(path: Path) -> dict[str, Any]:
    """The record of the checkpoint at ``path``, from its file; ConfigError if that is not readable."""
    record: dict[str, Any] = untrusted.read_json(path / "run" / "metadata", "--workdir", dict)
    return record


def misnamed(path: Path) -> str | None:
    """Whether a checkpoint says of itself that it is of another step than its folder's name."""
    step = read_record(path).get("step")
    return f"it is of step {step}" if type(step) is int and str(step) != path.name else None


def astray(path: Path) -> str | None:
    """Whether the step of a checkpoint's record cannot be that of its arrays, which count the updates.

    A step's update is made or skipped; those of earlier stages are not in the arrays' count.
    """
    record = read_record(path)
    if not (path / "step").is_dir() or record.keys() <= {"step"}:
        return None  # parameters alone, or a dump
    if "config" not in record:
        return "its record has no config"
    step, config, counts = record.get("step"), record["config"], record.get("skipped", [0, 0])
    if not (isinstance(counts, list) and len(counts) == 2 and type(counts[0]) is int):
        return "its record's skipped must be two counts"
    updates = int(_read_array(path / "step", min(_arrays(path / "step"))))
    staged = isinstance(config, dict) and config.get("stages")
    most = (1 << 31) - 1 if staged else updates + counts[0]
    if type(step) is int and (updates if staged else most) <= step <= most:
        return None
    return f"its record says step {str(step)[:20]}, its arrays {updates} updates"


def mend(directory: Path) -> None:
    """Makes the newest checkpoint a sound one: for the run that owns ``directory``, before it opens it.

    Removes what a killed save left. A checkpoint whose record tells another step than its name gets that name
    again, or goes aside if it is taken. Moves damaged checkpoints newer than the newest sound one to
    ``damaged`` beside ``directory``, so that training can come to their steps again; nothing is deleted.
    RunError when there are checkpoints and none is sound; then nothing is moved.
    """
    for half_written in directory.glob(HALF_WRITTEN):
        shutil.rmtree(half_written)
    for path in untrusted.numbered(directory):
        _name_again(path)
    found = untrusted.numbered(directory)
    damaged: dict[Path, str] = {}
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            break
        damaged[path] = problem
    listed = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
    if damaged and len(damaged) == len(found):
        fix = "Bring one back from a copy, or start anew in another --workdir."
        raise RunError(f"{directory}: no checkpoint is sound ({listed}). {fix}")
    for path in damaged:
        set_aside(path)
    if damaged:
        log.error("%s: passed over damaged checkpoints, now in damaged/ (%s)", directory, listed)


def _name_again(path: Path) -> None:
    try:
        problem = None if astray(path) else misnamed(path)
    except Exception:  # of Orbax's files, as in `damage`, which is looked for from the newest down
        return
    if not problem:
        return
    own = path.with_name(str(read_record(path)["step"]))
    if own.exists() or path.is_symlink():
        set_aside(path)
        log.error("%s: %s; set aside in damaged/", path, problem)
    else:
        path.rename(own)
        log.error("%s: %s; named so again", path, problem)


def set_aside(path: Path) -> None:
    """Moves a checkpoint to ``damaged`` beside the folder of checkpoints; in it, if that is elsewhere."""
    name = f"{path.name}-{time.time_ns()}"
    for place in (path.parent.parent / "damaged", path.parent / "damaged"):
        place.mkdir(exist_ok=True)
        try:
            path.rename(place / name)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint of a training state at ``path``, in words; None if it is sound.

    One without a seal (written by an older version) is read whole instead, which finds what is missing or
    cut short but not every flipped bit.
    """
    try:
        if problem := seal.damage(path):
            return problem
        untrusted.read_json(path / "_CHECKPOINT_METADATA", "--workdir")
        if not (path / COMMITTED).exists():
            return f"{COMMITTED} is missing"
        if not (path / seal.NAME).exists():
            log.info("%s: has no %s; reading it whole", path, seal.NAME)
            for item in ITEMS:
                if not (path / item).is_dir():
                    return f"{item} is missing"
            for item in ITEMS[:-1]:
                for name in _arrays(path / item):
                    _read_array(path / item, name)
        return astray(path) or misnamed(path)
    except Exception as error:  # tensorstore, JSON and the file system raise all kinds
        return first_line(error)


def array(item: Path, name: str, **how: Any) -> Any:
    """An array of an item, on disk. how: `tensorstore.open`'s spec says it."""
    spec = {"driver": "zarr", "kvstore": _store(item) | {"path": f"{name}/"}}
    return tensorstore.open(spec | how).result()


def _store(item: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}


def _arrays(item: Path) -> list[str]:
    """Names of the arrays of an item."""
    keys = tensorstore.KvStore.open(_store(item)).result().list().result()
    return [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]


def _read_array(item: Path, name: str) -> Any:
    return array(item, name, open=True).read().result()
