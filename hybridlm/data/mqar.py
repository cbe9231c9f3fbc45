"""Data kind "mqar": multi-query associative recall, generated as it is read.

Arora et al. 2023, "Zoology" (arXiv 2312.04927), with the sampling of its published generator: n distinct keys
from [1, V/2) and n distinct values from [V/2, V), written k v k v ...; then each key once more as a query, at
an even distance 2 * gap behind the pairs, gaps drawn without replacement with p(gap = j - 1) ~ a * j^(a - 1),
j = 1 .. (length - 2n) / 2. The only targets are the values, each at its query key's own index; the next input
is filler, so no answer is ever fed back.
"""

import ast
import dataclasses
import functools

import numpy as np

from hybridlm.data.mixture import Mixture
from hybridlm.data.source import NO_LOSS, Batch, Source, View, empty_rows, permutation
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError

BLOCK = 256  # examples generated at once


@dataclasses.dataclass(frozen=True)
class Config:
    """num_pairs: key-value pairs n of an example that fills a row of ``train.seq_len``.
    slices: instead, a mixture of lengths: "(length, pairs), ..." or "(length, pairs, weight), ...", weights
        being shares of the training rows. Examples shorter than a row are packed, each a document of its own.
    power_a: exponent a of the gaps; 1.0 is uniform, towards 0 queries crowd behind the pairs.
    random_non_queries: fill the unused query positions with tokens of the whole vocabulary rather than 0.
    train_examples: size of the training set of each slice (papers: 20k to 100k); 0 never repeats an example.
    val_examples: held-out examples of each slice.
    """

    num_pairs: int = 8
    slices: str = ""
    power_a: float = 0.01
    random_non_queries: bool = True
    train_examples: int = 0
    val_examples: int = 1000

    def check(self) -> None:
        if self.power_a <= 0:
            raise ConfigError("power_a", self.power_a, "must be positive", "The papers use 0.01.")
        for name, least in (("train_examples", 0), ("val_examples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"must be at least {least}")
        if self.slices:
            _parse(self.slices)


def open_source(config: Config, view: View) -> Source:
    """The task, or a mixture of its slices. Raises ConfigError for sizes that cannot be built."""
    sizes = _parse(config.slices) if config.slices else [(view.seq_len, config.num_pairs, 1.0)]
    for length, pairs, _ in sizes:
        field, value = ("slices", config.slices) if config.slices else ("num_pairs", config.num_pairs)
        if pairs < 1 or 4 * pairs > length:
            raise ConfigError(field, value, f"needs 1 <= pairs and 4 * pairs <= length, here {length}")
        if length > view.seq_len:
            raise ConfigError(
                field, value, f"needs lengths up to train.seq_len = {view.seq_len}, here {length}"
            )
        if length >= view.vocab_size:
            raise ConfigError(
                field, value, f"needs length < model.vocab_size = {view.vocab_size}, here {length}"
            )
    slices: dict[str, Source] = {
        f"{length}x{pairs}": Slice(length, pairs, config, view) for length, pairs, _ in sizes
    }
    if len(slices) < len(sizes):
        raise ConfigError("slices", config.slices, "names a slice twice", "Give it one weight instead.")
    if len(slices) == 1:
        return next(iter(slices.values()))
    weights = {f"{length}x{pairs}": weight for length, pairs, weight in sizes}
    return Mixture(slices, weights, view)


class Slice:
    """Source of one length and number of pairs; a row packs as many examples as it holds."""

    tokenizer: Tokenizer | None = None

    def __init__(self, length: int, pairs: int, config: Config, view: View):
        self.length, self.pairs, self.config, self.view = length, pairs, config, view
        self.vocab_size = view.vocab_size
        self.per_row = view.seq_len // length
        training = view.split == "train"
        self.examples = config.train_examples if training else config.val_examples
        self.num_rows = -(-self.examples // self.per_row) if self.examples else None
        self.entropy = (view.seed if training else 0, int(training), length, pairs)
        settings = (self.entropy, view.seq_len, view.vocab_size, self.examples, config.power_a)
        self.fingerprint = f"mqar {settings} {config.random_non_queries}"
        self._block = functools.lru_cache(maxsize=16)(self._generate)
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def describe(self) -> str:
        number = f"{self.examples:,}" if self.examples else "endless"
        return f"{number} examples of {self.length} tokens with {self.pairs} pairs, {self.per_row} a row"

    def rows(self, index_B: np.ndarray) -> Batch:
        batch = empty_rows(len(index_B), self.view.seq_len)
        used = self.per_row * self.length
        batch["segment_ids"][:, :used] = np.repeat(np.arange(1, self.per_row + 1), self.length)
        batch["positions"][:, :used] = np.tile(np.arange(self.length), self.per_row)
        for b, index in enumerate(index_B.tolist()):
            if self.num_rows is not None:
                epoch, index = divmod(index, self.num_rows)
                if self.view.split == "train":
                    index = int(self._order(epoch)[index])
            for k in range(self.per_row):
                example, at = index * self.per_row + k, slice(k * self.length, (k + 1) * self.length)
                if self.examples and example >= self.examples:  # the last row may not be full
                    batch["segment_ids"][b, at] = batch["positions"][b, at] = 0
                    continue
                tokens, targets = self._block(example // BLOCK)
                batch["tokens"][b, at] = tokens[example % BLOCK]
                batch["targets"][b, at] = targets[example % BLOCK]
        return batch

    def _shuffle(self, epoch: int) -> np.ndarray:
        assert self.num_rows is not None
        return permutation(self.num_rows, *self.entropy, epoch)

    def _generate(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, int32 [BLOCK, length], of examples block * BLOCK onwards."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*self.entropy, block))))
        pairs, vocab, example = self.pairs, self.vocab_size, np.arange(BLOCK)[:, None]
        keys = _distinct(rng, 1, vocab // 2, pairs)
        values = _distinct(rng, vocab // 2, vocab, pairs)
        tokens = np.zeros((BLOCK, self.length), np.int32)
        targets = np.full((BLOCK, self.length), NO_LOSS, np.int32)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        # Exponential clocks of rate p ring in the order of draws without replacement (Efraimidis & Spirakis
        # 2006).
        j = np.arange(1, (self.length - 2 * pairs) // 2 + 1)
        clocks = rng.exponential(size=(BLOCK, len(j))) / (
            self.config.power_a * j ** (self.config.power_a - 1.0)
        )
        query = 2 * pairs + 2 * np.argsort(clocks, axis=1)[:, :pairs]
        tokens[example, query], targets[example, query] = keys, values
        if self.config.random_non_queries:
            filler = rng.integers(vocab, size=tokens.shape, dtype=np.int32)
            tokens = np.where(tokens == 0, filler, tokens)
        return tokens, targets


def _distinct(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """[BLOCK, count] draws from [low, high) without replacement: ``count`` steps of Fisher-Yates at once."""
    deck = np.tile(np.arange(low, high, dtype=np.int32), (BLOCK, 1))
    example = np.arange(BLOCK)
    for i in range(count):
        j = rng.integers(i, high - low, size=BLOCK)
        deck[example, i], deck[example, j] = deck[example, j], deck[example, i]
    return deck[:, :count]


def _parse(slices: str) -> list[tuple[int, int, float]]:
    """[(length, pairs, weight)] of "(64, 4), (128, 8, 0.5)"."""
    try:
        parsed = ast.literal_eval(f"[{slices}]")
        sizes = [(length, pairs, *weight) for length, pairs, *weight in parsed]
        if not all(isinstance(s[0], int) and isinstance(s[1], int) and len(s) < 4 for s in sizes):
            raise ValueError
        sizes = [(s[0], s[1], float(s[2]) if len(s) == 3 else 1.0) for s in sizes]
        if not sizes or min(weight for *_, weight in sizes) <= 0:
            raise ValueError
    except (ValueError, TypeError, SyntaxError) as error:
        allowed = 'must read like "(64, 4), (128, 8)" or, with weights, "(64, 4, 5), (128, 8, 1)"'
        raise ConfigError("slices", slices, allowed) from error
    return sizes
