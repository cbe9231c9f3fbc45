"""Globs to files, files to documents, and the rule that holds documents out."""

import glob
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from hybridlm.errors import ConfigError

STDLIB = "python-stdlib:"  # in place of a glob: the source text of the running Python's standard library
STRUCTURED = (".jsonl", ".jsonl.gz", ".parquet")  # many documents a file
UNREADABLE = (
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tar",
    ".arrow",
    ".json",
)  # read neither as text nor otherwise


class File(NamedTuple):
    """key: the path below the glob's fixed part, with '/': equal on two machines that keep the same tree."""

    key: str
    path: str


def find(patterns: str, field: str) -> list[File]:
    """Files that match comma-separated globs (``**`` descends), each once, in order of pattern, then key.

    Raises ConfigError for a missing path, a directory and a glob that matches nothing.
    """
    found: dict[str, File] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        files = _stdlib() if pattern == STDLIB else _glob(pattern, field)
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        raise ConfigError(field, patterns, f"must be a path, a glob or {STDLIB!r}", "Name the files to read.")
    return list(found.values())


def held_out(key: str, fraction: float) -> bool:
    """Whether the document called ``key`` belongs to the held-out ``fraction``: its hash alone decides."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def read(file: File, text_field: str, field: str) -> Iterator[tuple[str, bytes, float]]:
    """Documents of one file, streamed: (key, text, part of the file read so far).

    ``.jsonl``, ``.jsonl.gz`` and ``.parquet`` hold one document a record, in ``text_field``; any other file
    is one document. Raises ConfigError for compressed or binary formats and for records without the text.
    """
    try:
        if file.path.endswith(".parquet"):
            yield from _parquet(file, text_field, field)
        elif file.path.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(file, text_field, field)
        elif file.path.endswith(UNREADABLE):
            allowed = "must be text, or one of " + ", ".join(STRUCTURED)
            raise ConfigError(field, file.path, allowed, "Unpack or convert it first.")
        else:
            yield file.key, Path(file.path).read_bytes(), 1.0
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise ConfigError(field, file.path, "cannot be read", f"{type(error).__name__}: {error}.") from error


def _glob(pattern: str, field: str) -> list[File]:
    pattern = os.path.expanduser(pattern)
    if not glob.has_magic(pattern):
        if os.path.isdir(pattern):
            raise ConfigError(field, pattern, "is a directory", f"Try {os.path.join(pattern, '**/*.txt')!r}.")
        if not os.path.exists(pattern):
            raise ConfigError(field, pattern, "does not exist", "Check the path, or mount the data.")
        return [File(os.path.basename(pattern), pattern)]
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join(*parts[:fixed]) if fixed else ""
    paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not paths:
        raise ConfigError(field, pattern, "matches no file", "Check the glob; ** descends into directories.")
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


def _jsonl(file: File, text_field: str, field: str) -> Iterator[tuple[str, bytes, float]]:
    size = max(os.path.getsize(file.path), 1)
    with open(file.path, "rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if file.path.endswith(".gz") else raw
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(field, where, "is not JSON", f"{error}.") from error
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                names = ", ".join(record) if isinstance(record, dict) else "none"
                raise ConfigError(field, where, f"has no text in {text_field!r}", f"Its fields: {names}.")
            # JSON can spell half a surrogate pair, which is no character and has no UTF-8: "?" stands for it.
            yield f"{file.key}#{number}", text.encode(errors="replace"), raw.tell() / size


def _parquet(file: File, text_field: str, field: str) -> Iterator[tuple[str, bytes, float]]:
    with pyarrow.parquet.ParquetFile(file.path) as table:
        if text_field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ConfigError(field, file.path, f"has no column {text_field!r}", f"Its columns: {names}.")
        number, total = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0):
                number += 1
                text = value.as_py()
                if not isinstance(text, str | None):
                    where = f"{file.path}:{number}"
                    raise ConfigError(
                        field, where, f"has no text in {text_field!r}", f"It holds {value.type}."
                    )
                yield f"{file.key}#{number}", (text or "").encode(), number / total
