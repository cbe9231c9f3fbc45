"""Tokenises text once: python -m hybridlm.data.prepare --input 'x/**/*.jsonl' --output DIR --tokenizer bytes

Reads text (a file is a document), JSON lines and Parquet, plain or compressed, or a dataset of the `datasets`
library, document by document, and writes the directory that data kind "shards" reads (see shards.py). Memory
stays bounded by one batch of documents and the offsets of one shard. The output appears under its name only
when it is complete. docs/data.md has the options.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hybridlm import commands, untrusted
from hybridlm.data import bpe, documents, files, holdout, hub, partial, shards, tokenizer
from hybridlm.data.documents import Document, Part
from hybridlm.errors import ConfigError
from hybridlm.run import cli

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 1 << 24  # whichever comes first is handed to the tokenizer at once


def prepare(
    inputs: str,
    output: str,
    tokenizer_name: str = "",
    *,
    text_field: str = "text",
    holdout: float = 0.0,
    shard_tokens: int = 1 << 27,
    val_inputs: str = "",
    train_bpe: int = 0,
    dataset: hub.Dataset | None = None,
) -> dict:
    """Writes ``output`` from the files that the globs ``inputs`` match, or ``dataset``; returns its index.

    tokenizer_name: "bytes" or a tokenizer.json; "" with train_bpe, the ids of a byte-level BPE tokenizer that
        is made from the training documents first.
    holdout: part of the documents that goes to the "val" split, by a hash of file and place in the file; at
        least one does, and of a single document its end.  val_inputs: globs of held-out files, instead.
    shard_tokens: a shard ends with the document that reaches this many tokens.
    Documents without tokens are left out, counted in the log and in the index. Raises ConfigError, fields
    named as the flags.
    """
    if bool(inputs) == bool(dataset):
        raise ConfigError("--input", inputs, "must name files, or else --dataset a dataset")
    if not 0 <= holdout < 1:
        raise ConfigError("--holdout", holdout, "must be in [0, 1)")
    if holdout and (val_inputs or (dataset and dataset.val_split)):
        raise ConfigError("--holdout", holdout, "must be 0 where held-out documents are named")
    if dataset and dataset.split == dataset.val_split:
        fix = "Name another, or give --holdout."
        raise ConfigError("--val_split", dataset.val_split, "is the split to train on", fix)
    if dataset and val_inputs:
        raise ConfigError("--val_input", val_inputs, "goes with --input; --dataset has --val_split")
    if shard_tokens < 1:
        raise ConfigError("--shard_tokens", shard_tokens, "must be positive")
    if bool(tokenizer_name) == bool(train_bpe):
        allowed = 'must be "bytes" or a tokenizer.json, or else --train_bpe a number of ids'
        raise ConfigError("--tokenizer", tokenizer_name, allowed)
    final = Path(output).expanduser()
    if final.exists():
        raise ConfigError("--output", output, "exists already", "Name another directory, or delete this one.")
    parts = hub.parts(dataset, text_field) if dataset else _parts(inputs, val_inputs, text_field)
    tokens = None if train_bpe else tokenizer.load(tokenizer_name, "--tokenizer")
    with partial.folder(final, "--output") as folder:
        if tokens is None:
            training = (one.text for _, one, split in _assigned(parts, holdout) if split == "train")
            bpe.train(filter(None, training), train_bpe, folder / "tokenizer.json")
            tokens = tokenizer.load(str(folder / "tokenizer.json"), "--tokenizer")
        job = _Job(tokens, folder, holdout, shard_tokens, dataset.name if dataset else inputs)
        job.write(parts)
        named = ("--val_split", dataset.val_split) if dataset else ("--val_input", val_inputs)
        if named[1] and not job.writers["val"].documents:
            raise ConfigError(*named, "gives no tokens to hold out", "Check the files.")
        return job.finish()


def _parts(inputs: str, val_inputs: str, text_field: str) -> list[Part]:
    """A file that is named for both splits is held out."""
    held = {os.path.realpath(f.path): f for f in files.find(val_inputs, "--val_input")} if val_inputs else {}
    found = [file for file in files.find(inputs, "--input") if os.path.realpath(file.path) not in held]
    if not found:
        raise ConfigError("--val_input", val_inputs, "holds out every file of --input", "Name other files.")
    wanted = [(file, "train" if held else "", "--input") for file in found]
    wanted += [(file, "val", "--val_input") for file in held.values()]
    parts = []
    for file, split, field in wanted:
        size = untrusted.regular(file.path, field).st_size
        parts.append(Part(size, split, functools.partial(documents.read, file, text_field, field)))
    return parts


def _assigned(parts: list[Part], fraction: float) -> Iterator[tuple[int, Document, str]]:
    """(number of its part, document, "train" or "val") of all documents; a single one is cut.

    "" is the split of documents that have no text.
    """
    first: tuple[int, Document] | None = None  # the only one with text so far, until there is a second
    several = fraction == 0
    rule = lambda document: "val" if holdout.held_out(document.key, fraction) else "train"
    for number, part in enumerate(parts):
        for document in part.read():
            if not document.text:
                yield number, document, ""
            elif part.split:
                yield number, document, part.split
            elif several:
                yield number, document, rule(document)
            elif first is None:
                first = number, document
            else:
                yield *first, rule(first[1])
                yield number, document, rule(document)
                first, several = None, True
    if first is not None:
        number, document = first
        text = document.text or b""
        at = holdout.cut(text, fraction)
        if not 0 < at < len(text):
            allowed = f"cannot cut the only text there is, of {len(text)} bytes"
            raise ConfigError("--holdout", fraction, allowed, "Add text, or hold out none.")
        for piece, split in ((text[:at], "train"), (text[at:], "val")):
            yield number, document._replace(text=piece), split


class _Job:
    """Documents to the shards of one folder."""

    def __init__(
        self, tokens: tokenizer.Tokenizer, folder: Path, fraction: float, shard_tokens: int, named: str
    ):
        self.tokens, self.folder, self.fraction, self.named = tokens, folder, fraction, named
        self.table = tokens.token_bytes
        self.writers = {
            split: shards.Writer(folder, split, tokens.dtype, shard_tokens) for split in ("train", "val")
        }
        self.total = self.empty = self.null = self.token_bytes = 0
        # The documents of each split that are nearest to the other: (rank, number in the split, bytes).
        self.nearest: dict[str, tuple[int, int, int]] = {}

    def write(self, parts: list[Part]) -> None:
        """Tokenises every document into its split, under a bar that counts the bytes of the files."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
        )  # fmt: skip
        sizes = [part.size for part in parts]
        before = np.cumsum([0, *sizes]).tolist()
        start = time.monotonic()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("tokenising", total=sum(sizes) or None, rate="")
            for batch in self._batches(parts):
                self._add(batch)
                number, document, _ = batch[-1]
                rate = f"{self.total / (time.monotonic() - start):,.0f} tokens/s"
                done = before[number] + int(document.part * sizes[number])
                progress.update(bar, completed=done, rate=rate)
            progress.update(bar, completed=sum(sizes))

    def finish(self) -> dict:
        """Fills a split that the hashes left empty, and writes the index."""
        train, val = self.writers["train"], self.writers["val"]
        if self.fraction and train.documents + val.documents > 1:
            if not val.documents:
                self._move("train", "val")
            elif not train.documents:
                self._move("val", "train")
        if not train.documents:
            raise ConfigError("--input", self.named, "gives no tokens to train on", "Check the files.")
        if self.fraction and not val.documents:
            allowed = "leaves nothing to hold out: one document alone has tokens"
            raise ConfigError("--holdout", self.fraction, allowed, "Add text, or hold out none.")
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        index = shards.write_index(self.folder, self.tokens, splits, self.empty, self.null)
        if self.table is not None:
            text_bytes = sum(split["text_bytes"] for split in splits.values())
            tokenizer.report(self.tokens, text_bytes, self.token_bytes)
        return index

    def _batches(self, parts: list[Part]) -> Iterator[list[tuple[int, Document, str]]]:
        batch: list[tuple[int, Document, str]] = []
        held = 0
        for number, document, split in _assigned(parts, self.fraction):
            self.null += document.text is None
            batch.append((number, document, split))
            held += len(document.text or b"")
            if len(batch) == BATCH_DOCUMENTS or held >= BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def _add(self, batch: list[tuple[int, Document, str]]) -> None:
        texts = [document.text or b"" for _, document, _ in batch]
        for (_, document, split), text, array in zip(batch, texts, self.tokens.documents(texts), strict=True):
            if len(array) == 1:
                self.empty += 1
                continue
            rank = holdout.rank(document.key)
            nearest = rank if split == "train" else -rank
            candidate = nearest, self.writers[split].documents, len(text)
            self.nearest[split] = min(self.nearest.get(split, candidate), candidate)
            self.writers[split].add(array, len(text))
            self.total += len(array)
            self.token_bytes += 0 if self.table is None else int(self.table[array].sum(dtype=np.int64))

    def _move(self, source: str, target: str) -> None:
        _, number, text_bytes = self.nearest[source]
        self.writers[target].add(self.writers[source].take(number, text_bytes), text_bytes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        commands.called("python -m hybridlm.data.prepare"), description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--input", nargs="+", default=[], help="globs or paths; quote globs that hold **")
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument("--tokenizer", default="", help='"bytes", or the path of a tokenizer.json')
    parser.add_argument(
        "--train_bpe", type=int, default=0, metavar="IDS", help="train a byte-level BPE of so many ids"
    )
    parser.add_argument("--text_field", default="text", help="field or column of the text (records)")
    parser.add_argument("--holdout", type=float, default=0.0, help="part of the documents to hold out")
    parser.add_argument("--val_input", nargs="+", default=[], help="globs of held-out files, instead")
    parser.add_argument("--shard_tokens", type=int, default=1 << 27, help="tokens in a shard")
    parser.add_argument(
        "--dataset", default="", help="a folder, or a name on the Hugging Face hub, that `datasets` can load"
    )
    parser.add_argument("--dataset_config", default="", help="configuration of the dataset")
    parser.add_argument("--split", default="", help="split of the dataset to train on (train)")
    parser.add_argument("--val_split", default="", help="split of the dataset to hold out")
    args = parser.parse_args(arguments)
    return cli.run(lambda: report(args), "nothing was kept")


def report(args: argparse.Namespace) -> None:
    """Prepares as the flags say, and prints what came of it."""
    start = time.monotonic()
    for name in ("dataset_config", "split", "val_split"):
        if getattr(args, name) and not args.dataset:
            raise ConfigError(f"--{name}", getattr(args, name), "is of a dataset", "Give --dataset, too.")
    dataset = hub.Dataset(args.dataset, args.dataset_config, args.split or "train", args.val_split)
    index = prepare(
        ",".join(args.input),
        args.output,
        args.tokenizer,
        text_field=args.text_field,
        holdout=args.holdout,
        shard_tokens=args.shard_tokens,
        val_inputs=",".join(args.val_input),
        train_bpe=args.train_bpe,
        dataset=dataset if args.dataset else None,
    )
    seconds = time.monotonic() - start
    for split, entry in index["splits"].items():
        print(
            f"{split}: {entry['documents']:,} documents, {entry['text_bytes']:,} bytes, "
            f"{entry['tokens']:,} tokens (one separator a document), {len(entry['shards'])} shards"
        )
    total = sum(entry["tokens"] for entry in index["splits"].values())
    print(
        f"left out: {index['empty_documents']:,} documents without tokens, "
        f"of which {index['null_documents']:,} with null for a text"
    )
    print(f"{total:,} tokens in {seconds:.1f} s, {total / seconds:,.0f} tokens/s")
    named = untrusted.terminal(args.tokenizer or f"byte-level BPE of {args.train_bpe} ids")
    output = untrusted.terminal(args.output)
    print(f"{output}: vocab_size {index['vocab_size']}, {index['dtype']}, tokenizer {named}")
    if not index["splits"]["val"]["documents"]:
        told = "a run that validates on them needs some: --holdout 0.01, or --val_input FILE"
        print(f"nothing is held out; {told}")


if __name__ == "__main__":
    sys.exit(main())
