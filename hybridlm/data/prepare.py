"""Tokenises text once: python -m hybridlm.data.prepare --input 'x/**/*.jsonl' --output DIR --tokenizer bytes

Reads text (a file is a document), JSONL (also gzipped) and Parquet, file by file, and writes the directory
that data kind "shards" reads (see shards.py). Memory stays bounded by one batch of documents and the offsets
of one shard. The output appears under its name only when it is complete.
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hybridlm.data import files, shards, tokenizer
from hybridlm.errors import ConfigError
from hybridlm.run import cli

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 1 << 24  # whichever comes first is handed to the tokenizer at once


def prepare(
    inputs: str,
    output: str,
    tokenizer_name: str,
    *,
    text_field: str = "text",
    holdout: float = 0.0,
    shard_tokens: int = 1 << 27,
) -> dict:
    """Writes ``output`` from the files that the globs ``inputs`` match; returns its index.

    holdout: part of the documents that goes to the "val" split, by a hash of file and place in the file.
    shard_tokens: a shard ends with the document that reaches this many tokens.
    Documents without tokens are left out, counted in the log and in the index. Raises ConfigError, fields
    named as the flags.
    """
    if not 0 <= holdout < 1:
        raise ConfigError("--holdout", holdout, "must be in [0, 1)")
    if shard_tokens < 1:
        raise ConfigError("--shard_tokens", shard_tokens, "must be positive")
    final = Path(output).expanduser()
    partial = final.with_name(final.name + ".partial")
    if final.exists():
        raise ConfigError("--output", output, "exists already", "Name another directory, or delete this one.")
    found = files.find(inputs, "--input")
    try:
        tokens = tokenizer.load(tokenizer_name)
    except ConfigError as error:
        raise ConfigError("--tokenizer", error.value, error.allowed, error.fix) from error
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        fix = "Delete it unless another prepare is running."
        raise ConfigError("--output", output, f"has an unfinished {partial.name} beside it", fix) from error
    except OSError as error:
        raise ConfigError("--output", output, "cannot be created", f"{error.strerror}.") from error
    try:
        writers = {
            split: shards.Writer(partial, split, tokens.dtype, shard_tokens) for split in ("train", "val")
        }
        token_bytes, empty = _write(found, tokens, writers, text_field, holdout)
        splits = {split: writer.finish() for split, writer in writers.items()}
        if not splits["train"]["documents"]:
            raise ConfigError(
                "--input", inputs, "gives no tokens to train on", "Check the files and --holdout."
            )
        index = shards.write_index(partial, tokens, splits, empty)
        os.rename(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                "--output", output, "has no space left on its disk", "Nothing was kept."
            ) from error
        raise
    except BaseException:  # an interrupt too: an unfinished directory is of no use to anyone
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if token_bytes is not None:
        tokenizer.report(tokens, sum(split["text_bytes"] for split in splits.values()), token_bytes)
    return index


def _write(
    found: list[files.File],
    tokens: tokenizer.Tokenizer,
    writers: dict[str, shards.Writer],
    text_field: str,
    holdout: float,
) -> tuple[int | None, int]:
    """Tokenises every document into its split.

    Returns the bytes that all tokens stand for, where known, and the number of documents left out as empty.
    """
    total = empty = 0
    table = tokens.token_bytes
    for batch in _batches(found, text_field):
        keys, texts = zip(*batch, strict=True)
        for key, text, array in zip(keys, texts, tokens.documents(texts), strict=True):
            if len(array) > 1:
                writers["val" if files.held_out(key, holdout) else "train"].add(array, len(text))
                total += 0 if table is None else int(table[array].sum(dtype=np.int64))
            else:
                empty += 1
    return None if table is None else total, empty


def _batches(found: list[files.File], text_field: str) -> Iterator[list[tuple[str, bytes]]]:
    """(key, text) of all documents in batches, under a bar that counts the bytes of the input files."""
    sizes = [os.path.getsize(file.path) for file in found]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("tokenising", total=sum(sizes))
        batch: list[tuple[str, bytes]] = []
        held = done = 0
        for file, size in zip(found, sizes, strict=True):
            for key, text, part in files.read(file, text_field, "--input"):
                batch.append((key, text))
                held += len(text)
                if len(batch) == BATCH_DOCUMENTS or held >= BATCH_BYTES:
                    yield batch
                    progress.update(bar, completed=done + int(part * size))
                    batch, held = [], 0
            done += size
        if batch:
            yield batch
        progress.update(bar, completed=done)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m hybridlm.data.prepare", description=__doc__.split("\n\n")[1])
    parser.add_argument("--input", required=True, nargs="+", help="globs or paths; quote globs that hold **")
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument("--tokenizer", required=True, help='"bytes", or the path of a tokenizer.json')
    parser.add_argument("--text_field", default="text", help="field or column of the text (JSONL, Parquet)")
    parser.add_argument("--holdout", type=float, default=0.0, help="part of the documents to hold out")
    parser.add_argument("--shard_tokens", type=int, default=1 << 27, help="tokens in a shard")
    args = parser.parse_args(arguments)
    return cli.run(lambda: report(args), "nothing was kept")


def report(args: argparse.Namespace) -> None:
    """Prepares as the flags say, and prints what came of it."""
    index = prepare(
        ",".join(args.input),
        args.output,
        args.tokenizer,
        text_field=args.text_field,
        holdout=args.holdout,
        shard_tokens=args.shard_tokens,
    )
    for split, entry in index["splits"].items():
        print(
            f"{split}: {entry['documents']:,} documents, {entry['text_bytes']:,} bytes, "
            f"{entry['tokens']:,} tokens (one separator a document), {len(entry['shards'])} shards"
        )
    print(f"left out: {index['empty_documents']:,} documents without tokens")
    print(f"{args.output}: vocab_size {index['vocab_size']}, {index['dtype']}, tokenizer {args.tokenizer}")


if __name__ == "__main__":
    sys.exit(main())
