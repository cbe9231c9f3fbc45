"""What a run was trained on and by: noted in its folder at each start, for the report."""

import contextlib
import datetime
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm import untrusted
from launch import state

MOST_STARTS = 100  # that are kept


def commit() -> str:
    """The commit of this code, with a + when files differ from it; the package's version outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True, check=False)
    with contextlib.suppress(OSError):  # no git
        if not ask("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            changed = ask("status", "--porcelain", "--untracked-files=no").stdout.strip()
            return ask("rev-parse", "--short=10", "HEAD").stdout.strip() + ("+" if changed else "")
    try:
        return importlib.metadata.version("hybridlm")
    except importlib.metadata.PackageNotFoundError:
        return "not known"


def start(device: str, jax: str, processes: int, together: int) -> dict[str, Any]:
    """One start.

    processes: that share the device.  together: runs in this program.  date: UTC.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "date": now,
        "commit": commit(),
        "device": device,
        "jax": jax,
        "processes": processes,
        "together": together,
    }


def note(folders: Sequence[Path], one: dict[str, Any]) -> None:
    """Adds a start to the notes in each folder."""
    for folder in folders:
        known = [*state.starts(folder), one][-MOST_STARTS:]
        untrusted.write_json(folder / state.MACHINE, {"starts": known})


def alone(starts: Sequence[dict[str, Any]]) -> bool:
    """Whether a run's speed is its own: at every start it had the device and the program to itself."""
    return bool(starts) and all(one.get("processes") == one.get("together") == 1 for one in starts)
