"""Data kind "text": text files, one document each, tokenised into memory when the run starts."""

import dataclasses
import hashlib
import logging
import os

import numpy as np

from hybridlm.data import files, source, tokenizer
from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

BATCH = 256  # documents handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """path: comma-separated globs of the files, or "python-stdlib:" for the source of Python's own library.
    val_path: globs of the held-out files; "" holds out a part of ``path`` instead.
    holdout: part of the files of ``path`` kept for validation, chosen by a hash of each file's relative path.
    tokenizer: "bytes" or a Hugging Face tokenizer.json. Bytes are kept as they are; a tokenizer file reads
        UTF-8, and invalid sequences become U+FFFD (counted in the log).

    Everything is held in memory (2 or 4 bytes a token): for more than a few GB use ``data.prepare``.
    """

    path: str = ""
    val_path: str = ""
    holdout: float = 0.05
    tokenizer: str = "bytes"

    def check(self) -> None:
        if not self.path:
            raise ConfigError("path", "", "must name files", f"Give globs, or {files.STDLIB!r}.")
        if not 0 <= self.holdout < 1:
            raise ConfigError("holdout", self.holdout, "must be in [0, 1)", "0.05 keeps one file of twenty.")


def open_source(config: Config, view: View) -> PackedDocuments:
    """The files of one split, packed. Raises ConfigError for missing, unsuitable or empty files."""
    tokens = tokenizer.load(config.tokenizer)
    return PackedDocuments(_documents(_split(config, view.split), tokens, config), tokens, view)


def _split(config: Config, split: str) -> list[files.File]:
    """The files of ``split``; a file belongs to one split only."""
    found = files.find(config.path, "path")
    if config.val_path:
        held = files.find(config.val_path, "val_path")
        paths = {os.path.realpath(file.path) for file in held}
        return held if split == "val" else [f for f in found if os.path.realpath(f.path) not in paths]
    chosen = [file for file in found if files.held_out(file.key, config.holdout) == (split == "val")]
    if not chosen:
        raise ConfigError(
            "holdout",
            config.holdout,
            f"leaves none of the {len(found)} files of {config.path!r} to the {split} split",
            "Change the fraction, or name held-out files in data.val_path.",
        )
    return chosen


def _documents(chosen: list[files.File], tokens: tokenizer.Tokenizer, config: Config) -> Documents:
    keys, texts = [], []
    for file in chosen:
        if file.path.endswith(files.STRUCTURED):
            fix = "Run python -m hybridlm.data.prepare and use kind 'shards'."
            raise ConfigError("path", file.path, "holds records, not one text", fix)
        for key, text, _ in files.read(file, "", "path"):
            keys.append(key)
            texts.append(text)
    arrays = [a for at in range(0, len(texts), BATCH) for a in tokens.documents(texts[at : at + BATCH])]
    kept = [i for i, array in enumerate(arrays) if len(array) > 1]
    if not kept:
        raise ConfigError("path", config.path, f"gives no tokens: its {len(chosen)} files are empty")
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
        (flat,),
        np.zeros(len(lengths), np.int32),
        np.cumsum(lengths) - lengths,
        lengths,
        digest.hexdigest(),
        name=lambda document: keys[kept[document]],
    )
