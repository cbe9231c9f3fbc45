"""Data kind "text": text files, perhaps compressed, one document each, tokenised into memory at the start."""

import dataclasses
import hashlib
import logging
import os

import numpy as np

from hybridlm.data import documents, files, holdout, source, tokenizer
from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import View
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

BATCH = 256  # documents handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """path: comma-separated globs of the files, or "python-stdlib:" for the source of Python's own library.
    val_path: globs of the held-out files; "" holds out a part of ``path`` instead. Data that are only
        validated on (``config.val``) need no ``path`` beside it.
    holdout: part of the files of ``path`` kept for validation, chosen by a hash of each file's relative path;
        of two or more at least one, of a single file its end.
    tokenizer: "bytes" or a Hugging Face tokenizer.json. Bytes are kept as they are; a tokenizer file reads
        UTF-8, and invalid sequences become U+FFFD (counted in the log).

    Everything is held in memory (2 or 4 bytes a token): for more than a few GB use ``data.prepare``.
    """

    path: str = ""
    val_path: str = ""
    holdout: float = 0.05
    tokenizer: str = "bytes"

    def load_tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.tokenizer)

    def check(self) -> None:
        if not self.path and not self.val_path:
            raise nothing()
        if not 0 <= self.holdout < 1:
            raise ConfigError("holdout", self.holdout, "must be in [0, 1)", "0.05 keeps one file of twenty.")

    def open(self, view: View) -> PackedDocuments:
        tokens = tokenizer.load(self.tokenizer)
        field = "val_path" if view.split == "val" and self.val_path else "path"
        named = (field, getattr(self, field))
        return PackedDocuments(_documents(_texts(self, view.split), tokens, named), tokens, view)


def nothing() -> ConfigError:
    return ConfigError("path", "", "must name files", f"Give globs, or {files.STDLIB!r}.")


def _texts(config: Config, split: str) -> list[tuple[str, bytes]]:
    """(key, text) of the documents of ``split``. A file belongs to one split; a single file is cut."""
    if not config.path and split == "train":
        raise nothing()
    found = files.find(config.path, "path") if config.path else []
    if config.val_path:
        held = files.find(config.val_path, "val_path")
        paths = {os.path.realpath(file.path) for file in held}
        chosen = held if split == "val" else [f for f in found if os.path.realpath(f.path) not in paths]
        if not chosen:
            fix = "Name other files in one of them."
            raise ConfigError("val_path", config.val_path, "holds out every file of data.path", fix)
        return [_read(file, "val_path" if split == "val" else "path") for file in chosen]
    filled = [file for file in found if os.path.getsize(file.path)]
    if config.holdout and len(filled) == 1:
        return _part(*_read(filled[0], "path"), config, split)
    held_N = holdout.choose([file.key for file in filled], config.holdout) if filled else []
    chosen = [file for file, held in zip(filled, held_N, strict=True) if held == (split == "val")]
    if filled and not chosen:
        fix = "Give a fraction, or name held-out files in data.val_path."
        raise ConfigError("holdout", config.holdout, "holds out nothing to validate on", fix)
    for file in set(found).difference(filled):  # to be counted with those of the split
        if holdout.held_out(file.key, config.holdout) == (split == "val"):
            chosen.append(file)
    return [_read(file, "path") for file in chosen]


def _part(key: str, text: bytes, config: Config, split: str) -> list[tuple[str, bytes]]:
    """The start of the only text there is, or the held-out end."""
    at = holdout.cut(text, config.holdout)
    if not 0 < at < len(text):
        fix = "Add text, or name held-out files in data.val_path."
        raise ConfigError("holdout", config.holdout, f"cannot cut a text of {len(text)} bytes", fix)
    return [(f"{key} from byte {at}", text[at:])] if split == "val" else [(f"{key} to byte {at}", text[:at])]


def _read(file: files.File, field: str) -> tuple[str, bytes]:
    fix = "Run python -m hybridlm.data.prepare and use kind 'shards'."
    return file.key, documents.whole(file, field, fix)


def _documents(
    given: list[tuple[str, bytes]], tokens: tokenizer.Tokenizer, named: tuple[str, str]
) -> Documents:
    """named: the field that named the files, and its value."""
    keys, texts = [key for key, _ in given], [text for _, text in given]
    arrays = [a for at in range(0, len(texts), BATCH) for a in tokens.documents(texts[at : at + BATCH])]
    kept = [i for i, array in enumerate(arrays) if len(array) > 1]
    if not kept:
        raise ConfigError(*named, "gives no tokens: its files are empty")
    if len(kept) < len(arrays):
        log.warning(
            "data: left out %d of %d documents, which are empty", len(arrays) - len(kept), len(arrays)
        )
    arrays = [arrays[i] for i in kept]
    flat = np.concatenate(arrays)
    lengths = np.array([len(array) for array in arrays], np.int64)
    if tokens.token_bytes is not None:
        tokenizer.report(tokens, sum(map(len, texts)), int(tokens.token_bytes[flat].sum(dtype=np.int64)))
    digest = hashlib.sha256(flat.data)
    digest.update(lengths.data)
    return Documents(
        lambda shard, start, stop: flat[start:stop],
        np.zeros(len(lengths), np.int32),
        np.cumsum(lengths) - lengths,
        lengths,
        digest.hexdigest(),
        name=lambda document: keys[kept[document]],
    )
