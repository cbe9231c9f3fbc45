"""Comma-separated paths and globs to files."""

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hybridlm import untrusted
from hybridlm.errors import ConfigError

STDLIB = "python-stdlib:"  # in place of a glob: the source text of the running Python's standard library


class File(NamedTuple):
    """key: the path below the glob's fixed part, with '/': equal on two machines that keep the same tree."""

    key: str
    path: str


def find(patterns: str, field: str) -> list[File]:
    """Files that match comma-separated globs (``**`` descends), each once, in order of pattern, then key.

    A path that exists is meant as it is spelt, with the commas and brackets in its names; so are the folders
    that a glob begins with. Raises ConfigError for a missing path, for what is no regular file, and for a
    glob that matches nothing.
    """
    found: dict[str, File] = {}
    for pattern in _patterns(patterns):
        try:
            files = _stdlib() if pattern == STDLIB else _glob(pattern, field)
        except ConfigError as error:
            if "," not in patterns:
                raise
            fix = f"{error.fix} Commas separate the parts of {patterns!r}."
            raise ConfigError(field, error.value, error.allowed, fix) from error
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        raise ConfigError(field, patterns, f"must be a path, a glob or {STDLIB!r}", "Name the files to read.")
    return list(found.values())


def _patterns(patterns: str) -> Iterator[str]:
    """``patterns`` cut at its commas, but for those inside of names: the longest name that exists is one."""
    parts = patterns.split(",")
    while parts:
        for count in range(len(parts), 0, -1):
            joined = ",".join(parts[:count]).strip()
            if count == 1 or (joined and _names(joined)):
                break
        parts = parts[count:]
        if joined:
            yield joined


def _names(pattern: str) -> bool:
    """Whether a pattern with a comma in it is one path, or a glob below a folder that has that comma."""
    fixed, rest = _literal(os.path.expanduser(pattern))
    return not rest or ("," not in rest and "," in fixed)


def _literal(pattern: str) -> tuple[str, str]:
    """The longest start of ``pattern`` that exists as it is spelt, and the rest."""
    parts = Path(pattern).parts
    count = len(parts)
    while count and not os.path.lexists(os.path.join(*parts[:count])):
        count -= 1
    fixed = os.path.join(*parts[:count]) if count else ""
    return fixed, os.path.join(*parts[count:]) if count < len(parts) else ""


def _glob(pattern: str, field: str) -> list[File]:
    pattern = os.path.expanduser(pattern)
    if "\0" in pattern:
        raise ConfigError(field, pattern, "holds a NUL, which no name does")
    root, rest = _literal(pattern)
    if not rest:
        if os.path.isdir(pattern):
            raise ConfigError(field, pattern, "is a directory", f"Try {os.path.join(pattern, '**/*.txt')!r}.")
        untrusted.regular(pattern, field)
        return [File(os.path.basename(pattern), pattern)]
    if not glob.has_magic(rest):
        fix = "Check the path, or mount the data."
        if root and not os.path.isdir(root):
            fix = f"{root!r} is a file."
        raise ConfigError(field, pattern, "does not exist", fix)
    # The folders before the first wildcard are fixed too, also where they do not exist.
    parts = Path(rest).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join(root, *parts[:first])
    paths = glob.glob(os.path.join(glob.escape(root), *parts[first:]), recursive=True)
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        brackets = " Brackets stand for one of the characters in them." if "[" in rest else ""
        fix = f"Check the glob; ** descends into directories.{brackets}"
        raise ConfigError(field, pattern, "matches no file", fix)
    return sorted(File(Path(os.path.relpath(path, root or ".")).as_posix(), path) for path in paths)


def _stdlib() -> list[File]:
    """Python files of the standard library, without tests, packages installed later and build settings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append(File(path.relative_to(root).as_posix(), str(path)))
    return sorted(files)
