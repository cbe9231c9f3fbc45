"""Compiled programs kept from one start of a run to the next: JAX's persistent compilation cache.

Unlike processors have folders of their own, since homes are shared. In the usual place what was used longest
ago goes when all folders together pass MOST_BYTES. (JAX's own limit, `jax_compilation_cache_max_size`, knows
one folder and no older jax's; in jax 0.10 an entry without its time, left by a kill or by a start without a
limit, makes it refuse every later one.)
"""

import contextlib
import hashlib
import logging
import os
import threading
from pathlib import Path

import jax
from jax import monitoring

from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

MOST_BYTES = 8 << 30  # of programs in the usual place, for all versions of jax and all processors
HIT = "/jax/compilation_cache/cache_hits"
hits: list[str] = []  # one for each program that was read from the cache; kernels' come in other threads
main = threading.main_thread
monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == HIT and threading.current_thread() is main() else None
)


def enable(setting: str) -> None:
    """setting: `schema.Train.compilation_cache`. A cache that the environment names stays.

    ConfigError for a folder that was asked for and cannot be made; the usual one is only done without.
    """
    if not setting or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = usual() if setting == "auto" else Path(setting).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting != "auto":
            problem = f"cannot be made: {error.strerror}"
            raise ConfigError("train.compilation_cache", setting, problem) from error
        log.warning("no compilation cache: %s: %s", folder, error.strerror)
        return
    if setting == "auto":
        prune(folder.parent)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def prune(place: Path, most_bytes: int = MOST_BYTES) -> None:
    """Removes the programs below ``place`` that were used longest ago, until the others have ``most_bytes``.

    Another process may do the same, or read one: it then compiles again.
    """
    found = []
    for path in place.glob("jax-*/*-cache"):
        with contextlib.suppress(OSError):
            state = path.stat()
            found.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def usual() -> Path:
    """In the user's cache folder, as the XDG base directories have it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    able = "\n".join(line for line in lines if line.startswith(("flags", "Features", "model name")))
    return Path(home) / "hybridlm" / f"jax-{jax.__version__}-{hashlib.sha256(able.encode()).hexdigest()[:8]}"


def said(before: int) -> str:
    """Whether the programs since ``before`` hits came from the cache."""
    where = folder()
    return f", {'read from' if len(hits) > before else 'kept in'} {where}" if where else ", no cache"


def folder() -> Path | None:
    """Where compiled programs are kept; None: nowhere."""
    name = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time
    return Path(name) if name else None
