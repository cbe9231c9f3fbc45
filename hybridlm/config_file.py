"""What a config is read from: a Python file with ``get_config``, which is run, or a run's config.json."""

import contextlib
import functools
import inspect
import logging
import traceback
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from hybridlm import commands, untrusted
from hybridlm.errors import ConfigError, nearest
from hybridlm.run import private

log = logging.getLogger("hybridlm")

T = TypeVar("T")
HINTS = {  # for a file that has this function in place of the one that was wanted
    "get_config": "train.py runs configs; a sweep file has get_sweep().",
    "get_sweep": f"A sweep runs with {commands.typed('python -m launch.sweep')}.",
}


def read(spec: str) -> ConfigDict:
    """The config of ``spec``: "file.py", "file.py:argument" or a run's "config.json"."""
    path = located(split(spec)[0])
    return from_json(path) if path.suffix == ".json" else run(spec, "get_config", ConfigDict)


def located(filename: str, field: str = "--config") -> Path:
    """``filename`` from here, or hybridlm's own where it is one of ``configs/``; ConfigError for neither."""
    path, root = Path(filename), commands.root()
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",) and (root / path).is_file():
        _say_whose(filename, root)
        return root / path
    known = [str(file) for file in path.parent.glob("*.py") if file.stem != "__init__"]
    fix = nearest(filename, known) if known else f"It was looked for from {Path.cwd()}."
    raise ConfigError(field, filename, "no such file", fix)


@functools.cache  # once, however often it is asked for
def _say_whose(filename: str, root: Path) -> None:
    log.info("there is no %s here; it is that of hybridlm, in %s", filename, root)


def split(spec: str) -> tuple[str, str]:
    """(file, argument). A file's own name may hold ":", so the longest part that is a file wins."""
    cuts = [len(spec), *(at for at in range(len(spec) - 1, 0, -1) if spec[at] == ":")]
    cut = next((at for at in cuts if Path(spec[:at]).is_file()), None)
    return (spec[:cut], spec[cut + 1 :]) if cut else (spec.partition(":")[0], spec.partition(":")[2])


def run(spec: str, function: str, kind: type[T]) -> T:
    """What ``function``, one of HINTS, of "file.py" or "file.py:argument" returns. Runs the file.

    ConfigError, with the line, for whatever goes wrong there, and if it is none of ``kind``.
    """
    filename, argument = split(spec)
    path = located(filename)
    spec = f"{path}:{argument}" if argument else str(path)
    try:
        module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(path.read_bytes(), path, "exec"), module)
        if function not in module:
            fix = next((hint for other, hint in HINTS.items() if other in module), "")
            raise ConfigError("--config", spec, f"the file defines no function {function}", fix)
        if argument and not inspect.signature(module[function]).parameters:
            problem = f"this file's {function} takes no argument"
            raise ConfigError("--config", spec, problem, f"Use {str(path)!r}.")
        found = module[function](*([argument] if argument else []))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        problem = f"failed at line {line} with {type(error).__name__} ({error})"
        raise ConfigError("--config", spec, problem) from error
    if not isinstance(found, kind):
        problem = f"{function} returned {type(found).__name__}, not a {kind.__name__}"
        raise ConfigError("--config", spec, problem)
    return found


def from_json(path: str | Path) -> ConfigDict:
    """What `config.to_json` wrote, for `config.resolve`. ConfigError for a file that is not a config.

    A run's that is damaged is taken from the newest readable record of its checkpoints.
    """
    path = Path(path)
    try:
        values = untrusted.read_json(path, "--config", {str: (dict, str)})
    except ConfigError as error:
        values = recorded(path)
        if values is None and _is_public(path):
            fix = "Make it a run: python -m hybridlm.convert import --hf=DIR --workdir=DIR."
            raise ConfigError("--config", str(path), "is of a public checkpoint, not of a run", fix) from None
        if values is None:
            raise
        log.warning("%s; its checkpoint's record is used", error)
    try:
        return ConfigDict(private.in_paths(values, private.reveal))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError("--config", str(path), f"is not a readable config.json ({error})") from error


def _is_public(path: Path) -> bool:
    try:
        untrusted.read_json(path, "--config", {"model_type": str})
    except ConfigError:
        return False
    return True


def recorded(path: Path) -> dict[str, Any] | None:
    """The config in the newest readable record of the checkpoints beside the config.json at ``path``."""
    for one in reversed(untrusted.numbered(path.parent / "checkpoints")):
        with contextlib.suppress(ConfigError):
            shape = {"config": {str: (dict, str)}}
            return dict(untrusted.read_json(one / "run" / "metadata", "--config", shape)["config"])
    return None
