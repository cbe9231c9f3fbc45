"""Batches of packed rows, each a pure function of (seed, step): `build(config.data, ...)` gives a Dataset."""

import dataclasses
import hashlib
import math
import threading
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from hybridlm.data import balance, mixture
from hybridlm.data.source import Batch, Config, Source, View, empty_rows
from hybridlm.errors import ConfigError, RunError, one_of
from hybridlm.fields import Named, mapping, under
from hybridlm.fields import build as build_fields

NAMES = (
    "text", "shards", "mqar", "copying", "joint_recall", "stack", "mad", "state_tracking", "counting",
    "phonebook", "latent_recall", "regression", "listops", "pathfinder", "labelled_text", "mixture",
)  # fmt: skip
KINDS: dict[str, type[Config]] = {name: import_module(f"{__name__}.{name}").Config for name in NAMES}


class Dataset:
    """Batches of one split, as seen by one process of a run.

    A batch of ``batch_size`` rows holds rows step * batch_size onwards of the source, and a process reads
    those of ``rows`` among them, so that the order does not depend on the number of processes. Rows that will
    be cut over several devices, ``pieces``, have their documents in an order that is even for these
    (`balance`).

    num_rows, vocab_size, tokenizer: of the `Source`.
    num_batches: batches in the held-out pass, the last filled up with padding rows; None when training,
        which goes on from epoch to epoch.
    token_bytes: bytes that each id stands for, int32 [vocab_size], or None when there is no bits per byte.
    fingerprint: a hash of all that decides the batches; a run can resume exactly if it is unchanged.
    """

    def __init__(
        self, source: Source, view: View, batch_size: int, rows: np.ndarray | None = None, pieces: int = 1
    ):
        self.source, self.view, self.batch_size, self.pieces = source, view, batch_size, pieces
        self.local_rows = np.arange(batch_size) if rows is None else rows
        self.verifier: threading.Thread | None = None
        self.damage: RunError | None = None
        self.num_rows, self.vocab_size, self.tokenizer = source.num_rows, source.vocab_size, source.tokenizer
        self.token_bytes = None if source.tokenizer is None else source.tokenizer.token_bytes
        self.num_batches, self.end = None, math.inf
        if view.split == "val":
            assert source.num_rows is not None
            self.num_batches, self.end = -(-source.num_rows // batch_size), source.num_rows
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {batch_size}".encode()).hexdigest()[:16]

    def batch(self, step: int) -> Batch:
        """tokens, targets, segment_ids, positions: int32 [rows, seq_len].

        targets: the token to predict at each position, -1 where there is no loss. Segments count from 1, 0 is
        padding; positions count from 0 in each segment. Raises IndexError outside the data, and RunError for
        files that are gone, hold unknown ids, or were found damaged by `verify`.
        """
        if self.damage:
            raise self.damage
        if step < 0 or (self.num_batches is not None and step >= self.num_batches):
            raise IndexError(f"batch {step} of {self.num_batches}")
        index_B = step * self.batch_size + self.local_rows
        inside_B = index_B < self.end
        batch = empty_rows(len(index_B), self.view.seq_len)
        for name, array in balance.evened(self.source.rows(index_B[inside_B]), self.pieces).items():
            batch[name][inside_B] = array
        return batch

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Starts to hold the stored files against their checksums in the background: each ``parts``-th one.

        Training need not wait for terabytes to be read: the next batch after a damaged file was found raises.
        """

        def read() -> None:
            try:
                for check in self.source.checks[part::parts]:
                    check()
            except RunError as error:
                self.damage = error
            except Exception as error:  # what could not be checked is not taken for sound
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                self.damage = RunError(f"data: the stored files could not be checked ({said}).")

        self.verifier = threading.Thread(target=read, name="data", daemon=True)
        self.verifier.start()

    def verified(self) -> None:
        """Waits for `verify`; RunError when a file is damaged."""
        if self.verifier:
            self.verifier.join()
        if self.damage:
            raise self.damage

    def whole_batch(self, step: int) -> Batch:
        """Training batch ``step`` with the rows of all processes."""
        rows = self.source.rows(step * self.batch_size + np.arange(self.batch_size))
        return balance.evened(rows, self.pieces)

    def sample_ids(self, step: int) -> list[str]:
        """Where each row of `whole_batch` comes from, so that a user can look at it."""
        return self.source.ids(step * self.batch_size + np.arange(self.batch_size))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """batch(start_step), batch(start_step + 1), ... read ahead by Grain's threads."""
        import grain  # slow to import, and not needed to read a batch

        stop = self.num_batches if self.num_batches is not None else 1 << 62
        steps = grain.MapDataset.range(start_step, max(stop, start_step))
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        try:
            yield from steps.map(self.batch).to_iter_dataset(options)
        except RunError as error:  # Grain adds lines about itself
            raise RunError(str(error).partition("\n")[0]) from None

    def held_out_bytes(self, num_batches: int | None = None) -> bytes:
        """The text that the loss of the first ``num_batches`` batches (None: all) is computed on, row by row.

        Of all processes together; b"" where tokens stand for no bytes.
        """
        assert self.num_rows is not None, "only the held-out split is finite"
        if self.tokenizer is None or self.tokenizer.pieces is None:
            return b""
        stop = self.num_rows if num_batches is None else min(num_batches * self.batch_size, self.num_rows)
        parts = []
        for row in range(stop):
            targets = self.source.rows(np.array([row]))["targets"]
            parts += [self.tokenizer.pieces[token] for token in targets[targets >= 0].tolist()]
        return b"".join(parts)


def build(
    given: Config | Mapping[str, Any],
    *,
    split: str,
    batch_size: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    rows: np.ndarray | None = None,
    pieces: int = 1,
    prefix: str = "data",
    held_out: int = 0,
) -> Dataset:
    """The data that ``given`` describes, a config's or a mapping.

    split, seq_len, seed, vocab_size, held_out: see `View`.  batch_size: rows of a batch over all processes.
    rows: those of each batch that this process reads; None: all.  pieces: devices that share a training row.
    prefix: of the fields in errors.
    Raises ConfigError for settings that name nothing readable, for data that need more ids than the model
    has, and for training data, or a part of a mixture, that do not fill their rows of one batch.
    """
    if batch_size < 1:
        raise ConfigError("train.batch_size", batch_size, "must be positive")
    view = View(split, seq_len, seed, vocab_size, held_out)
    with under(prefix):
        config = given if isinstance(given, Config) else settings(given)
        config.check()
        source = config.open(view)
    if source.vocab_size > vocab_size:
        name = source.tokenizer.name if source.tokenizer is not None else config.kind
        allowed = f"must be at least {source.vocab_size}, the ids of data tokenizer {name!r}"
        raise ConfigError("model.vocab_size", vocab_size, allowed)
    if split == "train" and source.num_rows is not None and source.num_rows < batch_size:
        allowed = f"is more than the {source.num_rows} rows of {seq_len} tokens that the training data fill"
        raise ConfigError("train.batch_size", batch_size, allowed, "Add data, or shorten batch or rows.")
    if split == "train" and isinstance(source, mixture.Mixture):
        with under(prefix):
            source.check_batch(batch_size)
    return Dataset(source, view, batch_size, rows, pieces if split == "train" else 1)


def config_class(kind: str) -> type[Config]:
    """The Config of ``kind``; ConfigError for a kind that there is not."""
    one_of("kind", kind, KINDS)
    return KINDS[kind]


def settings(values: Any, prefix: str = "") -> Config:
    """The settings that ``values``, a mapping with a kind, describe; a mixture's components likewise.

    ConfigError below ``prefix`` for fields that the kind does not have and for values that do not fit;
    what concerns several fields is left to `Config.check`.
    """
    mapping(values, prefix)
    with under(prefix):
        described, rest = config_class(str(values.get("kind"))), dict(values)
        if described is not mixture.Config or "components" not in rest:
            return build_fields(described, rest)
        components = rest.pop("components")
        config = build_fields(mixture.Config, rest)
        mapping(components, "components")
        parts = {name: settings(one, f"components.{name}") for name, one in components.items()}
        return dataclasses.replace(config, components=Named(parts))
