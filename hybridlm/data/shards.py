"""Data kind "shards": a directory of tokens that `python -m hybridlm.data.prepare` wrote, read through mmap.

index.json                 format, tokenizer and its hash, dtype, vocab_size, doc_id, and for each split the
                           totals and the shards with their counts and SHA-256
tokenizer.json             a copy of the tokenizer file, unless the tokens are bytes
train-00000.tokens         flat little-endian uint16 or uint32; each document is its separator and its tokens
train-00000.offsets        little-endian uint64 [documents + 1]: where each starts, then the number of tokens
val-00000.tokens ...
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from hybridlm.data import source, tokenizer
from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import View
from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")

FORMAT = "hybridlm-shards-1"
OFFSET = np.dtype("<u8")
FIX = "Write it again with python -m hybridlm.data.prepare."


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """path: the directory. Tokenizer and held-out documents were settled when it was written."""

    path: str = ""

    def check(self) -> None:
        if not self.path:
            raise ConfigError("path", "", "must name the directory that data.prepare wrote")


class Writer:
    """Appends documents of one split to shards of about ``shard_tokens`` tokens; documents are never cut."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.shards: list[dict] = []
        self.text_bytes = 0
        self._begin()

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """One document, its separator first, that stands for ``text_bytes`` bytes of text."""
        if self.offsets[-1] >= self.shard_tokens:
            self._end()
            self._begin()
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.text_bytes += text_bytes

    def finish(self) -> dict:
        """Closes the last shard; returns the split's entry of the index."""
        self._end()
        totals = {name: sum(shard[name] for shard in self.shards) for name in ("documents", "tokens")}
        return totals | {"text_bytes": self.text_bytes, "shards": self.shards}

    def _begin(self) -> None:
        self.name = f"{self.split}-{len(self.shards):05d}"
        self.file = open(self.directory / f"{self.name}.tokens", "wb")  # noqa: SIM115 (_end closes it)
        self.offsets, self.digest = [0], hashlib.sha256()

    def _end(self) -> None:
        _sync(self.file)
        if len(self.offsets) == 1:  # nothing came: only the first shard of an empty split
            os.remove(self.file.name)
            return
        with open(self.directory / f"{self.name}.offsets", "wb") as file:
            file.write(np.array(self.offsets, OFFSET).tobytes())
            _sync(file)
        counts = {"documents": len(self.offsets) - 1, "tokens": self.offsets[-1]}
        self.shards.append({"name": self.name, **counts, "sha256": self.digest.hexdigest()})


def write_index(
    directory: Path, tokens: tokenizer.Tokenizer, splits: dict[str, dict], empty_documents: int = 0
) -> dict:
    """Writes index.json, and the tokenizer beside it; returns the index."""
    name = "bytes"
    if tokens.name != "bytes":
        name = "tokenizer.json"
        (directory / name).write_bytes(Path(tokens.name).expanduser().read_bytes())
    index = {
        "format": FORMAT,
        "tokenizer": {"name": name, "fingerprint": tokens.fingerprint},
        "vocab_size": tokens.vocab_size,
        "doc_id": tokens.doc_id,
        "dtype": tokens.dtype.name,
        "empty_documents": empty_documents,
        "splits": splits,
    }
    with open(directory / "index.json", "w") as file:
        json.dump(index, file, indent=2)
        _sync(file)
    return index


def open_source(config: Config, view: View) -> PackedDocuments:
    """One split of the directory, packed. Raises ConfigError for a directory that is missing or damaged."""
    directory = Path(config.path).expanduser()
    index, digest = _read_index(directory, config)
    name = index["tokenizer"]["name"]
    try:
        tokens = tokenizer.load(name if name == "bytes" else str(directory / name))
    except ConfigError as error:
        raise ConfigError("path", config.path, f"is damaged: {error}", FIX) from error
    if (tokens.fingerprint, tokens.doc_id) != (index["tokenizer"]["fingerprint"], index["doc_id"]):
        raise ConfigError(
            "path", config.path, f"is damaged: {name} is not the tokenizer it was written with", FIX
        )
    entry = index["splits"].get(view.split, {"documents": 0})
    if not entry["documents"]:
        fix = "Write it again with --holdout." if view.split == "val" else FIX
        raise ConfigError("path", config.path, f"has no documents in its {view.split} split", fix)
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    shards = [shard for shard in entry["shards"] if shard["documents"]]
    for shard in entry["shards"]:
        if not shard["documents"]:
            log.warning("data: shard %s is empty", shard["name"])
    opened = [_open_shard(directory, shard, dtype, config) for shard in shards]
    starts, lengths = [offsets[:-1] for _, offsets in opened], [np.diff(offsets) for _, offsets in opened]
    counts = [len(start) for start in starts]
    shard_N = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
    first = np.cumsum(counts) - counts

    def named(document: int) -> str:
        shard = int(shard_N[document])
        return f"{shards[shard]['name']} document {document - first[shard]}"

    documents = Documents(
        tuple(array for array, _ in opened),
        shard_N,
        np.concatenate(starts),
        np.concatenate(lengths),
        digest,
        name=named,
        present=lambda shard: _present(directory, shards[shard], dtype),
        checks=tuple(functools.partial(_check, directory, shard) for shard in shards),
    )
    return PackedDocuments(documents, tokens, view)


def _present(directory: Path, shard: dict, dtype: np.dtype) -> None:
    """RunError when a mapped file is gone or cut short: reading past its end would kill the process."""
    path = directory / f"{shard['name']}.tokens"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RunError(
            f"{path}: the shard has disappeared while the run reads it ({error.strerror})."
        ) from error
    if size != shard["tokens"] * dtype.itemsize:
        raise RunError(f"{path}: the shard has changed to {size} bytes while the run reads it.")


def _check(directory: Path, shard: dict) -> None:
    path = directory / f"{shard['name']}.tokens"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: the shard cannot be read ({error.strerror}).") from error
    if digest != shard["sha256"]:
        raise RunError(f"{path}: the shard is damaged: its SHA-256 is not the one in index.json. {FIX}")


def _read_index(directory: Path, config: Config) -> tuple[dict, str]:
    path = directory / "index.json"
    if not path.is_file():
        state = "has no index.json" if directory.is_dir() else "is no directory"
        raise ConfigError("path", config.path, f"{state}: it must be what data.prepare wrote", FIX)
    content = path.read_bytes()
    try:
        index = json.loads(content)
        format = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "path", config.path, f"is damaged: index.json cannot be read ({error})", FIX
        ) from error
    if format != FORMAT:
        raise ConfigError("path", config.path, f"has format {format!r}, must be {FORMAT!r}", FIX)
    return index, hashlib.sha256(content).hexdigest()


def _open_shard(
    directory: Path, shard: dict, dtype: np.dtype, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (mapped, not read) and offsets int64 of one shard, held against the index."""
    path = directory / shard["name"]
    sizes = {
        ".tokens": shard["tokens"] * dtype.itemsize,
        ".offsets": (shard["documents"] + 1) * OFFSET.itemsize,
    }
    for suffix, expected in sizes.items():
        file = path.with_suffix(suffix)
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            allowed = f"is damaged: {file.name} {found}, the index says {expected}"
            raise ConfigError("path", config.path, allowed, FIX)
    offsets = np.fromfile(path.with_suffix(".offsets"), OFFSET).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) < 2).any():
        raise ConfigError(
            "path", config.path, f"is damaged: {path.name}.offsets do not increase to the end", FIX
        )
    # A plain array view of the map: slices of np.memmap itself are an order of magnitude slower.
    return np.asarray(np.memmap(path.with_suffix(".tokens"), dtype, mode="r")), offsets


def _sync(file: IO[Any]) -> None:
    """Closes a file whose bytes are on the disk: the rename that follows must not overtake them."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
