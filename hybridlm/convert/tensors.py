"""safetensors folders, read and written one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length of a JSON header; the header
maps names to dtype, shape and byte range; then the bytes. Read here without the `safetensors` package
because its NumPy side knows no bfloat16 and cannot write a file tensor by tensor. A folder holds one
model.safetensors, or shards that model.safetensors.index.json lists.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hybridlm.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class Tensor(NamedTuple):
    """What a header says of one tensor; start and end are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Folder:
    """The tensors of a checkpoint folder. ConfigError for --hf when it is not whole."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ConfigError("--hf", str(directory), "is not a directory")
        self.tensors: dict[str, Tensor] = {}
        index = self.directory / INDEX
        listed = _weight_map(index) if index.is_file() else None
        files = sorted(set(listed.values())) if listed is not None else [SINGLE]
        missing = [name for name in files if not (self.directory / name).is_file()]
        if missing:
            what = "shards that its index lists are missing" if listed is not None else "has no such file"
            raise ConfigError("--hf", str(directory), f"{what}: {', '.join(missing)}")
        for name in files:
            self.tensors |= header(self.directory / name)
        if listed is not None and set(listed) != set(self.tensors):
            absent = sorted(set(listed) - set(self.tensors))
            extra = sorted(set(self.tensors) - set(listed))
            problem = (
                f"the index and the shards disagree; only in the index: {absent}; only in shards: {extra}"
            )
            raise ConfigError("--hf", str(directory), problem)

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype."""
        file, dtype, shape, start, end = self.tensors[name]
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; ConfigError for a file that is cut short or damaged."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError("--hf", str(file), problem, "Download it again.")

    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise refuse(f"is no safetensors file, or is cut short: {size} bytes")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            tensors = {
                name: Tensor(
                    file, e["dtype"], tuple(e["shape"]), *(8 + length + at for at in e["data_offsets"])
                )
                for name, e in entries.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise refuse(f"has a damaged header ({type(error).__name__}: {error})") from None
    for name, (_, dtype, shape, start, end) in tensors.items():
        if end > size:
            raise refuse(f"is cut short: {name} ends at byte {end}, the file at {size}")
        if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise refuse(f"has a damaged header: {name} is {dtype}{list(shape)} in {end - start} bytes")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "--hf", str(index), f"is no readable index ({type(error).__name__}: {error})"
        ) from None


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
                array = np.ascontiguousarray(value(name).astype(DTYPES[one.dtype], copy=False))
                assert array.shape == one.shape, name
                stream.write(array.reshape(-1).view(np.uint8).data)
    if len(files) > 1:
        total = sum(one.nbytes for one in planned.values())
        weight_map = {name: one.file for name, one in sorted(planned.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
