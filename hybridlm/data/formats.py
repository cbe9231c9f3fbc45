"""What a file holds, by its name in any case and by its content: text, records, or nothing that can be read.

The content decides where it can: compressed files and Parquet are known by their first bytes whatever they
are called, and containers of other kinds are refused by theirs, so that their bytes are never taken for text.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow

from hybridlm import untrusted
from hybridlm.errors import ConfigError

SAMPLE = 1 << 16  # bytes at a file's start that tell what it is
CODECS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz",
          ".lz4": "lz4"}  # fmt: skip
RECORDS = (".jsonl", ".ndjson", ".jsonlines", ".jsonln")  # one JSON object a line
PARQUET = (".parquet", ".pq", ".parq")
READABLE = f"must be text, records ({', '.join(RECORDS)}) or Parquet ({', '.join(PARQUET)})"
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, MemoryError)

_STANDARD: dict[str, Any] = {"gzip": gzip, "bz2": bz2, "xz": lzma}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_CONTAINERS = {  # name: (place, bytes)
    "Parquet": (0, b"PAR1"),
    "Arrow": (0, b"ARROW1"),
    "an Arrow stream": (0, b"\xff\xff\xff\xff"),
    "Feather": (0, b"FEA1"),
    "ORC": (0, b"ORC"),
    "Avro": (0, b"Obj\x01"),
    "a zip archive": (0, b"PK\x03\x04"),
    "a tar archive": (257, b"ustar"),
    "a 7z archive": (0, b"7z\xbc\xaf\x27\x1c"),
    "a rar archive": (0, b"Rar!\x1a\x07"),
    "a NumPy array": (0, b"\x93NUMPY"),
    "HDF5": (0, b"\x89HDF\r\n\x1a\n"),
    "an SQLite database": (0, b"SQLite format 3\0"),
    "PDF": (0, b"%PDF-"),
    "PostScript": (0, b"%!PS-Adobe"),
    "a PNG image": (0, b"\x89PNG\r\n"),
    "a JPEG image": (0, b"\xff\xd8\xff"),
    "a GIF image": (0, b"GIF8"),
    "a program": (0, b"\x7fELF"),
}
_CONTAINER_NAMES = (
    ".arrow", ".feather", ".ipc", ".orc", ".avro", ".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst",
    ".7z", ".rar", ".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".safetensors",
    ".tfrecord", ".tfrecords", ".array_record", ".arrayrecord", ".mds", ".idx", ".db", ".sqlite", ".msgpack",
    ".pdf", ".doc", ".docx", ".epub", ".br", ".lzma", ".lzo", ".sz", ".snappy", ".z",
)  # fmt: skip
_CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))


class Format(NamedTuple):
    """kind: "text" (one document), "records" (JSON lines) or "parquet".  codec: a value of CODECS, or ""."""

    kind: str
    codec: str


def identify(path: str, field: str) -> Format:
    """What the file ``path`` holds. ConfigError naming the file for what is not read, or cannot be."""
    name = os.path.basename(path).casefold()
    with readable(path, field):
        untrusted.regular(path, field)
        with open(path, "rb") as file:
            head = file.read(SAMPLE)
        codec = _codec(head)
        stem, suffix = os.path.splitext(name)
        if suffix in CODECS:
            if not codec:
                raise _refusal(field, path, f"it is not {CODECS[suffix]}, as its name says")
            name = stem
        if codec:
            with stream(path, codec) as (_, opened):
                head = opened.read(SAMPLE)
            if inner := _codec(head):
                raise _refusal(field, path, f"inside of {codec} it is {inner} once more")
    return Format(_kind(name, head, codec, path, field), codec)


@contextlib.contextmanager
def readable(path: str, field: str) -> Iterator[None]:
    """What goes wrong in reading ``path`` is one line of a ConfigError."""
    try:
        yield
    except DAMAGE as error:
        said = (str(error) or "no room for it in memory").splitlines()[0].rstrip(".")
        raise ConfigError(field, path, "cannot be read", f"{type(error).__name__}: {said}.") from error


@contextlib.contextmanager
def stream(path: str, codec: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the file as it lies, which tells how far it was read; the same decompressed)."""
    with open(path, "rb") as raw:
        opened: Any = raw
        if codec in _STANDARD:
            opened = _STANDARD[codec].open(raw)
        elif codec:  # pyarrow closes neither itself nor what it reads from
            source = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), codec)
            opened = io.BufferedReader(source, 1 << 20)
        yield raw, opened


def _kind(name: str, head: bytes, codec: str, path: str, field: str) -> str:
    container = next((n for n, (at, magic) in _CONTAINERS.items() if head[at:].startswith(magic)), None)
    suffix = os.path.splitext(name)[1]
    if container == "Parquet" and not codec:
        return "parquet"
    if container:
        raise _refusal(field, path, f"inside of {codec} it is {container}" if codec else f"it is {container}")
    if suffix in PARQUET:
        raise _refusal(field, path, "it is not Parquet, as its name says")
    if suffix in _CONTAINER_NAMES:
        raise _refusal(field, path, f"a {suffix} file is none of these")
    if problem := _not_text(head):
        raise _refusal(field, path, problem)
    if suffix in RECORDS or (suffix == ".json" and _is_records(head)):
        return "records"
    if suffix == ".json":
        raise _refusal(field, path, "it is one JSON value, not a record on each line", "Write it as .jsonl.")
    return "text"


def _codec(head: bytes) -> str:
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60:
        return "zstd"  # a frame to skip, with which pzstd begins
    return next((codec for magic, codec in _COMPRESSED.items() if head.startswith(magic)), "")


def _not_text(head: bytes) -> str | None:
    """Why bytes are taken for no text; None if they may be one, in any encoding that extends ASCII."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        with contextlib.suppress(UnicodeDecodeError):
            head[: len(head) // 2 * 2].decode("utf-16")
            if len(head) % 2 == 0:
                return "it is UTF-16, must be UTF-8"
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls > max(1, len(head) // 100):
        return f"{controls} of its first {len(head)} bytes are control characters"
    return None


def _is_records(head: bytes) -> bool:
    """Whether a .json file has an object on its first line, or one whose line is longer than ``head``."""
    line, end, _ = head.lstrip().partition(b"\n")
    if not line.startswith(b"{") or not (end or len(head) < SAMPLE):
        return line.startswith(b'{"')
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _refusal(field: str, path: str, problem: str, fix: str = "Unpack or convert it first.") -> ConfigError:
    return ConfigError(field, path, f"{READABLE}; {problem}", fix)
