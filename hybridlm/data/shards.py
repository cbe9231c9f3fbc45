"""Data kind "shards": a directory of tokens that `python -m hybridlm.data.prepare` wrote, read row by row.

index.json                 format, tokenizer and its hash, dtype, vocab_size, doc_id; for each split totals,
                           and shards with their counts and the SHA-256 of both files; its own SHA-256
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
import re
import resource
from pathlib import Path
from typing import IO

import numpy as np

from hybridlm import untrusted
from hybridlm.data import source, tokenizer
from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import View
from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")

FORMAT = "hybridlm-shards-2"
UNSEALED = "hybridlm-shards-1"  # without sums of the offsets and of the index
OFFSET = np.dtype("<u8")
# Open shards of all sources together: a process has 1024 file descriptors or so.
OPEN = max(4, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
FIX = "Write it again with python -m hybridlm.data.prepare."

_COUNT = untrusted.NATURAL
_SHARD = {"name": str, "documents": _COUNT, "tokens": _COUNT, "sha256": str, "offsets_sha256?": str}
_SPLIT = {"documents": _COUNT, "tokens": _COUNT, "text_bytes?": _COUNT, "shards": [_SHARD]}
_INDEX = {
    "format": str, "tokenizer": {"name": str, "fingerprint": str}, "doc_id": _COUNT, "dtype": str,
    "splits": {str: _SPLIT}, "sha256?": str,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """path: the directory. Tokenizer and held-out documents were settled when it was written."""

    path: str = ""

    def load_tokenizer(self) -> tokenizer.Tokenizer:
        path, shape = Path(self.path).expanduser(), {"tokenizer": {"name": str}}
        named = untrusted.read_json(path / "index.json", "data.path", shape)["tokenizer"]["name"]
        return tokenizer.load(named if named == "bytes" else str(untrusted.inside(path, named, "data.path")))

    def check(self) -> None:
        if not self.path:
            raise ConfigError("path", "", "must name the directory that data.prepare wrote")

    def open(self, view: View) -> PackedDocuments:
        """One split of the directory, packed. ConfigError for a directory that is missing or damaged."""
        directory = Path(self.path).expanduser()
        index, digest = _read_index(directory, self)
        tokens = _tokenizer(directory, index, self)
        entry = index["splits"].get(view.split, {"documents": 0})
        if not entry["documents"]:
            fix = "Write it again with --holdout." if view.split == "val" else FIX
            raise ConfigError("path", self.path, f"has no documents in its {view.split} split", fix)
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        shards = [shard for shard in entry["shards"] if shard["documents"]]
        for shard in entry["shards"]:
            if not shard["documents"]:
                log.warning("data: shard %s is empty", shard["name"])
        offsets = [_offsets(directory, shard, dtype, self) for shard in shards]
        counts = [len(one) - 1 for one in offsets]
        shard_N = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        first = np.cumsum(counts) - counts

        def named(document: int) -> str:
            shard = int(shard_N[document])
            return f"{shards[shard]['name']} document {document - first[shard]}"

        files = [(directory / f"{shard['name']}.tokens", shard["tokens"]) for shard in shards]
        documents = Documents(
            functools.partial(_read, files, dtype),
            shard_N,
            np.concatenate([one[:-1] for one in offsets]),
            np.concatenate([np.diff(one) for one in offsets]),
            digest,
            name=named,
            checks=tuple(functools.partial(_check, directory, s, dtype, tokens.doc_id) for s in shards),
        )
        return PackedDocuments(documents, tokens, view)


class Writer:
    """Appends documents of one split to shards of about ``shard_tokens`` tokens; documents are never cut."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.shards: list[dict] = []
        self.documents = self.text_bytes = self.begun = 0
        self.file: IO[bytes] | None = None
        self._begin()

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """One document, its separator first, that stands for ``text_bytes`` bytes of text."""
        if self.file is None or self.offsets[-1] >= self.shard_tokens:
            self.close()
            self._begin()
        assert self.file is not None
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.documents += 1
        self.text_bytes += text_bytes

    def take(self, number: int, text_bytes: int) -> np.ndarray:
        """Takes document ``number`` of those added out again, and returns its tokens."""
        self.close()
        for shard in self.shards:
            if number < shard["documents"]:
                break
            number -= shard["documents"]
        name = shard["name"]
        tokens = np.fromfile(self.directory / f"{name}.tokens", self.dtype)
        offsets = np.fromfile(self.directory / f"{name}.offsets", OFFSET).astype(np.int64)
        begin, end = offsets[number : number + 2].tolist()
        left = np.concatenate([tokens[:begin], tokens[end:]])
        kept = np.delete(offsets, number + 1)
        kept[number + 1 :] -= end - begin
        self.documents -= 1
        self.text_bytes -= text_bytes
        if len(kept) == 1:
            self.shards.remove(shard)
            for suffix in ("tokens", "offsets"):
                os.remove(self.directory / f"{name}.{suffix}")
        else:
            untrusted.write_bytes(self.directory / f"{name}.tokens", left.tobytes())
            shard |= self._finished(name, kept, hashlib.sha256(left.tobytes()).hexdigest())
        return tokens[begin:end]

    def finish(self) -> dict:
        """Closes the last shard; returns the split's entry of the index."""
        self.close()
        totals = {name: sum(shard[name] for shard in self.shards) for name in ("documents", "tokens")}
        return totals | {"text_bytes": self.text_bytes, "shards": self.shards}

    def close(self) -> None:
        """Ends the shard that is being written, if there is one."""
        if self.file is None:
            return
        self.file.flush()
        os.fsync(self.file.fileno())  # the rename that follows must not overtake the bytes
        self.file.close()
        self.file = None
        if len(self.offsets) == 1:  # nothing came: only the first shard of an empty split
            os.remove(self.directory / f"{self.name}.tokens")
            return
        self.shards.append(self._finished(self.name, np.array(self.offsets), self.digest.hexdigest()))

    def _begin(self) -> None:
        self.name = f"{self.split}-{self.begun:05d}"
        self.begun += 1
        self.file = open(self.directory / f"{self.name}.tokens", "wb")  # noqa: SIM115 (`close` closes it)
        self.offsets, self.digest = [0], hashlib.sha256()

    def _finished(self, name: str, offsets: np.ndarray, digest: str) -> dict:
        """Writes the offsets of a shard whose tokens are written; returns its entry of the index."""
        content = offsets.astype(OFFSET).tobytes()
        untrusted.write_bytes(self.directory / f"{name}.offsets", content)
        counts = {"documents": len(offsets) - 1, "tokens": int(offsets[-1])}
        sums = {"sha256": digest, "offsets_sha256": hashlib.sha256(content).hexdigest()}
        return {"name": name, **counts, **sums}


def write_index(
    directory: Path,
    tokens: tokenizer.Tokenizer,
    splits: dict[str, dict],
    empty_documents: int = 0,
    null_documents: int = 0,
) -> dict:
    """Writes index.json, and the tokenizer beside it; returns the index.

    empty_documents: left out for want of tokens; null_documents: those of them whose text was null.
    """
    name = "bytes"
    if isinstance(tokens, tokenizer.FileTokenizer):
        name = "tokenizer.json"
        untrusted.write_bytes(directory / name, tokens.content)
    index = {
        "format": FORMAT,
        "tokenizer": {"name": name, "fingerprint": tokens.fingerprint},
        "vocab_size": tokens.vocab_size,
        "doc_id": tokens.doc_id,
        "dtype": tokens.dtype.name,
        "empty_documents": empty_documents,
        "null_documents": null_documents,
        "splits": splits,
    }
    index["sha256"] = index_sum(index)
    untrusted.write_json(directory / "index.json", index)
    return index


def index_sum(index: dict) -> str:
    """SHA-256 of all that an index says besides."""
    rest = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Shard:
    """An open file of tokens. Not mapped: who reads the end of a map that was cut off is killed."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if "file" in vars(self):
            os.close(self.file)


_opened = functools.lru_cache(maxsize=OPEN)(lambda path, device, inode: _Shard(path))


def _read(files: list[tuple[Path, int]], dtype: np.dtype, shard: int, start: int, stop: int) -> np.ndarray:
    """Tokens ``start`` to ``stop``; RunError for a file that is gone, or not as long as it was.

    files: the path of each shard, and its number of tokens.
    """
    (path, count), size = files[shard], dtype.itemsize
    try:
        state = os.stat(path)
        if state.st_size != count * size:
            raise _changed(path, state.st_size)
        opened, read = _opened(path, state.st_dev, state.st_ino), b""
        while missing := (stop - start) * size - len(read):
            more = os.pread(opened.file, missing, start * size + len(read))
            if not more:
                raise _changed(path, os.fstat(opened.file).st_size)
            read += more
    except FileNotFoundError as error:
        said = f"the shard has disappeared while the run reads it ({error.strerror})"
        raise RunError(f"{path}: {said}.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return np.frombuffer(read, dtype)


def _changed(path: Path, size: int) -> RunError:
    return RunError(f"{path}: the shard has changed to {size} bytes while the run reads it.")


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(f"{path}: the shard cannot be read ({error}).")


def _check(directory: Path, shard: dict, dtype: np.dtype, doc_id: int) -> None:
    path = directory / f"{shard['name']}.tokens"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            raise RunError(f"{path}: the shard is damaged: its SHA-256 is not the one in index.json. {FIX}")
        if "offsets_sha256" not in shard:
            offsets = np.fromfile(path.with_suffix(".offsets"), OFFSET).astype(np.int64)
            starts = np.flatnonzero(np.fromfile(path, dtype) == doc_id)
            if not np.array_equal(starts, offsets[:-1]):
                said = "the offsets, which have no SHA-256, are not where the documents begin"
                raise RunError(f"{path.with_suffix('.offsets')}: the shard is damaged: {said}. {FIX}")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _damaged(config: Config, problem: str, fix: str = FIX) -> ConfigError:
    return ConfigError("path", config.path, f"is damaged: {problem}", fix)


def _read_index(directory: Path, config: Config) -> tuple[dict, str]:
    path = directory / "index.json"
    if not path.is_file():
        state = "has no index.json" if directory.is_dir() else "is no directory"
        raise ConfigError("path", config.path, f"{state}: it must be what data.prepare wrote", FIX)
    try:
        index = untrusted.read_json(path, "path", {"format": str})
        if index["format"] in (FORMAT, UNSEALED):
            _check_index(index)
        content = untrusted.read_bytes(path, "path")
    except ConfigError as error:
        raise _damaged(config, f"index.json {error.allowed}", error.fix or FIX) from error
    except ValueError as error:
        raise _damaged(config, f"in index.json {error}") from error
    if index["format"] not in (FORMAT, UNSEALED):
        raise ConfigError("path", config.path, f"has format {index['format']!r}, must be {FORMAT!r}", FIX)
    return index, hashlib.sha256(content).hexdigest()


def _check_index(index: dict) -> None:
    """ValueError for an index that is not what was written, or that could not have been."""
    if index["format"] == FORMAT and index.get("sha256") != index_sum(index):
        raise ValueError("the SHA-256 of the rest is not the one that it gives")
    untrusted.check_shape(index, _INDEX)
    if index["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype must be uint16 or uint32, not {index['dtype']!r}")
    for split, entry in index["splits"].items():
        for total in ("documents", "tokens"):
            if entry[total] != sum(shard[total] for shard in entry["shards"]):
                raise ValueError(f"the {total} of {split} are not those of its shards together")
        for shard in entry["shards"]:
            if not re.fullmatch(r"[\w-]+", shard["name"]):
                raise ValueError(f"a shard has the name {shard['name']!r}")
            if index["format"] == FORMAT and shard["documents"] and "offsets_sha256" not in shard:
                raise ValueError(f"{shard['name']} has no offsets_sha256")


def _tokenizer(directory: Path, index: dict, config: Config) -> tokenizer.Tokenizer:
    name = index["tokenizer"]["name"]
    if name not in ("bytes", "tokenizer.json"):
        raise _damaged(config, f"its tokenizer is {name!r}, must be bytes or tokenizer.json")
    try:
        tokens = tokenizer.load(name if name == "bytes" else str(directory / name))
    except ConfigError as error:
        raise _damaged(config, str(error)) from error
    if (tokens.fingerprint, tokens.doc_id) != (index["tokenizer"]["fingerprint"], index["doc_id"]):
        raise _damaged(config, f"{name} is not the tokenizer it was written with")
    return tokens


def _offsets(directory: Path, shard: dict, dtype: np.dtype, config: Config) -> np.ndarray:
    """Offsets int64 of one shard, whose files are held against the index (its tokens by size only)."""
    path = directory / shard["name"]
    for suffix, expected in (
        (".tokens", shard["tokens"] * dtype.itemsize),
        (".offsets", (shard["documents"] + 1) * OFFSET.itemsize),
    ):
        file = path.with_suffix(suffix)
        size = file.stat().st_size if file.is_file() else -1
        if size != expected:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise _damaged(config, f"{file.name} {found}, the index says {expected}")
    try:
        content = path.with_suffix(".offsets").read_bytes()
    except OSError as error:
        said = f"{path.name}.offsets cannot be read"
        raise ConfigError("path", config.path, said, f"{error.strerror}.") from error
    if shard.get("offsets_sha256") not in (None, hashlib.sha256(content).hexdigest()):
        raise _damaged(config, f"{path.name}.offsets: its SHA-256 is not the one in index.json")
    offsets = np.frombuffer(content, OFFSET).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) < 2).any():
        raise _damaged(config, f"{path.name}.offsets do not increase to the end")
    return offsets
