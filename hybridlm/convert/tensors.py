"""safetensors folders, read and written one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length of a JSON header; the header
maps names to dtype, shape and byte range; then the bytes. Read here without the `safetensors` package
because its NumPy side knows no bfloat16 and cannot write a file tensor by tensor. A folder holds one
model.safetensors, or shards that model.safetensors.index.json lists.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hybridlm import untrusted
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER, MAX_RANK = 100_000_000, 8  # the former is the format's
ENTRY = {"dtype": str, "shape": [untrusted.NATURAL], "data_offsets": [untrusted.NATURAL]}
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class Tensor(NamedTuple):
    """What a header says of one tensor; start and end are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Folder:
    """The tensors of a checkpoint folder. ConfigError for --hf when it is not whole.

    Where there is an index it rules: a shard may hold the names that the index gives it, and no other.
    single: the file, where there is none.
    """

    def __init__(self, directory: str | Path, single: str = SINGLE):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ConfigError("--hf", str(directory), "is not a directory")
        self.tensors: dict[str, Tensor] = {}
        index = self.directory / INDEX
        listed: dict[str, str] | None = None
        if index.is_file():
            path = untrusted.inside(self.directory, INDEX, "--hf")
            listed = untrusted.read_json(path, "--hf", {"weight_map": {str: str}})["weight_map"]
        files = sorted(set(listed.values())) if listed is not None else [single]
        paths = {name: untrusted.inside(self.directory, name, "--hf") for name in files}
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            what = "shards that its index lists are missing" if listed is not None else "has no such file"
            raise ConfigError("--hf", str(directory), f"{what}: {', '.join(missing)}")
        for name, path in paths.items():
            held = header(path)
            elsewhere = [one for one in held if listed is not None and listed.get(one) != name]
            if elsewhere:
                problem = f"holds tensors that its index does not give it: {_names(elsewhere)}"
                raise ConfigError("--hf", str(path), problem)
            self.tensors |= held
        absent = set(listed or ()) - set(self.tensors)
        if absent:
            raise ConfigError(
                "--hf", str(directory), f"its shards lack tensors of its index: {_names(absent)}"
            )

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype."""
        file, dtype, shape, start, end = self.tensors[name]
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        if len(data) != end - start:
            raise ConfigError("--hf", str(file), "was cut short while it was read")
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _names(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(untrusted.terminal, names[:most])) + rest


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; ConfigError for a file that is cut short or damaged."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError("--hf", str(file), problem, "Download it again.")

    size = untrusted.regular(file, "--hf").st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise refuse(f"is no safetensors file, or is cut short: {size} bytes")
        if length > MAX_HEADER:
            raise refuse(f"has a header of {length:,} bytes, more than the {MAX_HEADER:,} of the format")
        content = stream.read(length)
    try:
        entries = untrusted.parse(content)
        if isinstance(entries, dict):
            entries.pop("__metadata__", None)
        untrusted.check_shape(entries, {str: ENTRY})
    except ValueError as error:
        raise refuse(f"has a damaged header: {untrusted.terminal(str(error))}") from None
    tensors = {}
    for name, entry in entries.items():
        dtype, shape, said = entry["dtype"], tuple(entry["shape"]), untrusted.terminal(name)
        start, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (1, 0)
        if start > end or len(shape) > MAX_RANK:
            raise refuse(f"has a damaged header: {said} has no place or shape")
        start, end = start + 8 + length, end + 8 + length
        if end > size:
            raise refuse(f"is cut short: {said} ends at byte {end}, the file at {size}")
        if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise refuse(f"has a damaged header: {said} is {dtype}{list(shape)} in {end - start} bytes")
        tensors[name] = Tensor(file, untrusted.terminal(dtype), shape, start, end)
    return tensors


class Planned(NamedTuple):
    """A tensor to be written: its file's name, its dtype (a key of DTYPES) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def shards(tensors: Iterable[tuple[str, str, tuple[int, ...]]], limit: int) -> dict[str, Planned]:
    """(name, dtype, shape) in order, cut into files of at most ``limit`` bytes each."""
    groups: list[dict[str, Planned]] = [{}]
    for name, dtype, shape in tensors:
        one = Planned("", dtype, shape)
        if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + one.nbytes > limit:
            groups.append({})
        groups[-1][name] = one
    files = [SINGLE]
    if len(groups) > 1:
        files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    return {
        name: one._replace(file=file)
        for file, group in zip(files, groups, strict=True)
        for name, one in group.items()
    }


def _cast(name: str, given: np.ndarray, dtype: str) -> np.ndarray:
    """``given``, contiguous, in ``dtype``; ConfigError where that has no room for a finite number."""
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(given.astype(DTYPES[dtype], copy=False))
    if not np.isfinite(array).all():
        said = untrusted.terminal(name)
        if np.isfinite(given).all():
            problem = f"cannot hold {said}, whose largest number is {np.abs(given).max():.3g}"
            raise ConfigError("--dtype", dtype, problem, "Export it as F32 or BF16.")
        log.warning("%s holds numbers that are not finite", said)
    return array


def write(directory: Path, planned: Mapping[str, Planned], value: Callable[[str], np.ndarray]) -> None:
    """Writes every planned tensor, `value(name)` asked for once each, file by file in order."""
    files: dict[str, dict[str, Planned]] = {}
    for name, one in planned.items():
        files.setdefault(one.file, {})[name] = one
    for file, group in files.items():
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, one in group.items():
            span = [offset, offset + one.nbytes]
            entries[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
            offset += one.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data start at a multiple of 8, as the format asks
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, one in group.items():
                stream.write(_cast(name, value(name), one.dtype).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        total = sum(one.nbytes for one in planned.values())
        weight_map = {name: one.file for name, one in sorted(planned.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        untrusted.write_json(directory / INDEX, index)
