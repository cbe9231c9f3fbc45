"""Rows of synthetic examples, each a pure function of (seed, index), for the kinds of data that are tasks.

A task is a function that makes a block of examples of one length. A row packs as many as it holds, each a
document of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from hybridlm.data import source
from hybridlm.data.source import NO_LOSS, Batch, View, empty_rows, permutation
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Positive

BLOCK = 256  # examples made at once
Examples = tuple[np.ndarray, np.ndarray]
Make = Callable[[np.random.Generator], Examples]


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """What the settings of every task have.

    train_examples: size of the training set; 0 never repeats an example.
    val_examples: held-out examples.
    """

    train_examples: Count = 0
    val_examples: Positive = 1000


def need(view: View, field: str, value: object, *, seq_len: int = 0, vocab_size: int = 0) -> None:
    """ConfigError unless rows have so many tokens, and the model so many ids."""
    if view.seq_len < seq_len:
        raise ConfigError(field, value, f"needs train.seq_len >= {seq_len}, here {view.seq_len}")
    if view.vocab_size < vocab_size:
        allowed = f"needs model.vocab_size of at least {vocab_size}, here {view.vocab_size}"
        raise ConfigError(field, value, allowed)


class Generated:
    """Source of the examples that ``make`` makes, as many as ``config`` wants of the split.

    make: random generator -> tokens and targets, int32 [BLOCK, length]; targets are at the index whose output
        predicts them, NO_LOSS elsewhere. None for a class that has its own `_generate`.
    name: says what decides the examples apart from length, seed and split; part of the fingerprint.
    entropy: non-negative integers that seed the blocks, apart from those that View gives.
    """

    tokenizer: Tokenizer | None = None
    checks: tuple[Callable[[], None], ...] = ()

    def __init__(
        self, make: Make | None, view: View, config: Config, *, name: str, length: int, entropy: Sequence[int]
    ):
        self.make, self.view, self.name, self.length = make, view, name, length
        self.vocab_size = view.vocab_size
        self.per_row = view.seq_len // length
        training = view.split == "train"
        self.examples = examples = config.train_examples if training else config.val_examples
        self.num_rows = -(-examples // self.per_row) if examples else None
        self.entropy = (view.seed if training else view.held_out, int(training), *entropy)
        self.fingerprint = f"{name} {(self.entropy, length, view.seq_len, view.vocab_size, examples)}"
        # A finite set is read in random order, so all of it is kept; otherwise blocks come one after another.
        self._block = functools.lru_cache(maxsize=None if examples else 16)(self._generate)
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def describe(self) -> str:
        number = f"{self.examples:,}" if self.examples else "endless"
        return f"{number} examples of {self.length} tokens, {self.per_row} a row: {self.name}"

    def rows(self, index_B: np.ndarray) -> Batch:
        batch = empty_rows(len(index_B), self.view.seq_len)
        used = self.per_row * self.length
        batch["segment_ids"][:, :used] = np.repeat(np.arange(1, self.per_row + 1), self.length)
        batch["positions"][:, :used] = np.tile(np.arange(self.length), self.per_row)
        for b, index in enumerate(map(self._place, index_B.tolist())):
            for k in range(self.per_row):
                example, at = index * self.per_row + k, slice(k * self.length, (k + 1) * self.length)
                if self.examples and example >= self.examples:  # the last row may not be full
                    batch["segment_ids"][b, at] = batch["positions"][b, at] = 0
                    continue
                tokens, targets = self._block(example // BLOCK)
                batch["tokens"][b, at] = tokens[example % BLOCK]
                batch["targets"][b, at] = targets[example % BLOCK]
        return batch

    def ids(self, index_B: np.ndarray) -> list[str]:
        firsts = [self._place(index) * self.per_row for index in index_B.tolist()]
        return [f"{self.name} examples {first} to {first + self.per_row - 1}" for first in firsts]

    def _place(self, index: int) -> int:
        """The row of the data set that is read as row ``index``."""
        if self.num_rows is None:
            return index
        epoch, place = divmod(index, self.num_rows)
        return int(self._order(epoch)[place]) if self.view.split == "train" else place

    def _shuffle(self, epoch: int) -> np.ndarray:
        assert self.num_rows is not None
        return permutation(self.num_rows, *self.entropy, epoch)

    def _generate(self, block: int) -> Examples:
        assert self.make is not None
        seed = np.random.SeedSequence((*self.entropy, block))
        return self.make(np.random.Generator(np.random.Philox(seed)))


def no_targets(tokens: np.ndarray) -> np.ndarray:
    return np.full(tokens.shape, NO_LOSS, np.int32)


def draw_distinct(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """[BLOCK, count] draws from [low, high) without replacement: ``count`` steps of Fisher-Yates at once."""
    deck = np.tile(np.arange(low, high, dtype=np.int32), (BLOCK, 1))
    example = np.arange(BLOCK)
    for i in range(count):
        j = rng.integers(i, high - low, size=BLOCK)
        deck[example, i], deck[example, j] = deck[example, j], deck[example, i]
    return deck[:, :count]


def classified(
    made: Sequence[tuple[Sequence[int] | np.ndarray, int]], length: int, mark: int, pad: int, first: int = 0
) -> Examples:
    """Tokens and targets, int32 [examples, length], of (tokens, class): ``pad`` before them, ``mark`` behind.

    The class, counted from the id ``first``, is the target at the mark, the last token of the row. Tokens may
    be length - 1 at most.
    """
    tokens = np.full((len(made), length), pad, np.int32)
    tokens[:, -1] = mark
    for row, (given, _) in zip(tokens, made, strict=True):
        row[length - 1 - len(given) : -1] = given
    targets = no_targets(tokens)
    targets[:, -1] = [first + label for _, label in made]
    return tokens, targets
