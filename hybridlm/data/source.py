"""What every kind of data offers: rows of tokens by index, as a pure function of the index."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.fields import Above
from hybridlm.kinds import Settings

Batch = dict[str, np.ndarray]
NO_LOSS = -1  # the target of a position that is not to be predicted


class View(NamedTuple):
    """Which part of the data is wanted, and how it is cut.

    split: "train" is endless (epoch after epoch, each in its own order); "val" is one pass over what is held
        out, in an order that does not depend on ``seed``, so that runs with other seeds are compared on the
        same rows.
    seq_len: tokens in a row.  seed: of the training order.
    vocab_size: ids that the model knows; synthetic tasks use them all, text must not need more.
    held_out: seed of generated held-out examples; those of a training run are of 0.
    """

    split: str
    seq_len: int
    seed: int
    vocab_size: int
    held_out: int = 0


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What the settings of every kind of data have.

    weight: share of the rows in a mixture, in any unit; without one it has no meaning.
    """

    weight: Above = dataclasses.field(default=1.0, kw_only=True)

    def check(self) -> None:
        """ConfigError, with a field relative to the definition, for settings that do not fit together."""

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the data name, read without their tokens; None if these stand for no text."""
        return None

    @abc.abstractmethod
    def open(self, view: View) -> "Source":
        """What ``view`` wants of the data; ConfigError where they cannot be read, or fit no such rows."""
        raise NotImplementedError


class Source(Protocol):
    """Rows by index.

    num_rows: rows in one pass; None for data that never repeat.
    tokenizer: None when the tokens stand for no text.
    fingerprint: equal for two sources only if they give equal rows.
    checks: each reads a stored file whole and raises RunError when it is damaged.
    """

    vocab_size: int
    fingerprint: str

    @property
    def num_rows(self) -> int | None: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def checks(self) -> Sequence[Callable[[], None]]: ...

    def rows(self, index_B: np.ndarray) -> Batch:
        """Rows ``index_B`` (int64, each >= 0): tokens, targets, segment_ids, positions, int32 [B, T]."""

    def ids(self, index_B: np.ndarray) -> list[str]:
        """What each row holds, in words that find it in the data."""

    def describe(self) -> str:
        """One line: how much there is."""


def empty_rows(num_rows: int, seq_len: int) -> Batch:
    """Rows of padding only: segment 0 and no loss anywhere."""
    batch = {name: np.zeros((num_rows, seq_len), np.int32) for name in ("tokens", "segment_ids", "positions")}
    return batch | {"targets": np.full((num_rows, seq_len), NO_LOSS, np.int32)}


def permutation(length: int, *entropy: int) -> np.ndarray:
    """A permutation of range(length), int64, that is a function of the non-negative integers ``entropy``.

    Sorts raw Philox words: NumPy promises their stream for all versions, which it does not for
    ``Generator.permutation``, and an order must survive an upgrade between a run and its resumption.
    """
    seed = np.random.SeedSequence((len(entropy), *entropy))  # without a length, (1,) and (1, 0) are the same
    words = np.random.Philox(seed).random_raw(length)
    return np.argsort(words, kind="stable")
