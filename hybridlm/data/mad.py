"""Data kind "mad": tasks of Mechanistic Architecture Design (Poli et al. 2024, arXiv 2403.17844).

Definitions are those of the authors' published generator, with its baseline settings as defaults. V is
model.vocab_size, whose ids are used as there; a row holds train.seq_len tokens.

in_context_recall   keys and values in turn, each key with one value throughout an example; a value is asked
                    for wherever its key was seen before, as the last one always was. Training predicts every
                    next token, validation only those values.
noisy_in_context_recall   some pairs are replaced by two tokens of a noise vocabulary of its own
fuzzy_in_context_recall   keys and values are motifs of 1 to 3 tokens; in validation keys always have 3
memorization        one fixed map from keys to values behind all examples: "key <insert>", the value is
                    predicted at <insert> and never shown
selective_copying   tokens among blanks, then <copy> and one blank for each: they are predicted in order

MAD's sixth task, compression, reads out one hidden state through a decoder of its own, which a language model
does not have; it is not offered.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, Make, no_targets
from hybridlm.data.source import NO_LOSS, View, permutation
from hybridlm.errors import ConfigError, one_of
from hybridlm.fields import Count, Positive

MAP_SEED = 12345
MOTIF = 3


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """task: see the module.
    noise_vocab, noise_fraction: ids kept for noise, and the share of pairs it replaces (noisy recall).
    copied: tokens to copy (selective copying).
    train_examples: 12,800 there, 256 for memorization.
    """

    task: str = "in_context_recall"
    noise_vocab: Positive = 16
    noise_fraction: float = 0.2
    copied: Positive = 16
    train_examples: Count = 12800
    val_examples: Positive = 1280

    def check(self) -> None:
        one_of("task", self.task, TASKS)
        if not 0 <= self.noise_fraction < 1:
            raise ConfigError("noise_fraction", self.noise_fraction, "must be in [0, 1)")

    def open(self, view: View) -> Generated:
        make = TASKS[self.task](self, view)
        length = make(np.random.default_rng(0))[0].shape[1]
        name = f"{self.task} {(self.noise_vocab, self.noise_fraction, self.copied)}"
        entropy = (4, list(TASKS).index(self.task), length)
        return Generated(make, view, self, name=name, length=length, entropy=entropy)


def _recall(config: Config, view: View) -> Make:
    with_noise = config.task == "noisy_in_context_recall"
    noise_fraction, noise_vocab = (config.noise_fraction, config.noise_vocab) if with_noise else (0.0, 0)
    pairs, vocab = view.seq_len // 2, view.vocab_size - noise_vocab
    _require(config, view, pairs >= 2 and vocab >= 4, "train.seq_len >= 4 and 4 ids beside the noise")
    keys = vocab // 2

    def make(rng: np.random.Generator) -> Examples:
        value_of = rng.integers(keys, vocab, size=(BLOCK, keys), dtype=np.int32)
        key = rng.integers(keys, size=(BLOCK, pairs), dtype=np.int32)
        noisy = rng.random((BLOCK, pairs)) < noise_fraction
        # One pair is never noise; drawn among all, the last (a query) included, as there.
        noisy[np.arange(BLOCK), rng.integers(pairs, size=BLOCK)] = False
        noisy[:, 0] &= ~noisy[:, :-1].all(axis=1)  # nothing to ask for: there an error, here the first pair
        seen = np.zeros((BLOCK, keys), bool)
        asked = np.zeros((BLOCK, pairs), bool)
        example = np.arange(BLOCK)
        for i in range(pairs - 1):
            asked[:, i] = seen[example, key[:, i]] & ~noisy[:, i]
            seen[example, key[:, i]] |= ~noisy[:, i]
        key[:, -1] = np.argmax(np.where(seen, rng.random(seen.shape), -1), axis=1)  # uniform over those seen
        asked[:, -1], noisy[:, -1] = True, False
        value = np.take_along_axis(value_of, key, axis=1)
        if noise_vocab:
            noise = rng.integers(vocab, vocab + noise_vocab, size=(2, BLOCK, pairs), dtype=np.int32)
            key, value = np.where(noisy, noise[0], key), np.where(noisy, noise[1], value)
        tokens = np.stack([key, value], axis=2).reshape(BLOCK, -1)
        answers = np.where(np.repeat(asked, 2, axis=1) & (np.arange(2 * pairs) % 2 == 1), tokens, NO_LOSS)
        return tokens[:, :-1], (tokens if view.split == "train" else answers)[:, 1:]

    return make


def _fuzzy(config: Config, view: View) -> Make:
    pad, vocab, length = view.vocab_size - 1, view.vocab_size - 1, view.seq_len
    keys, training = vocab // 2, view.split == "train"
    _require(config, view, keys >= MOTIF and length >= 6 * MOTIF, "train.seq_len >= 18 and 7 ids")

    def motif(rng: np.random.Generator, low: int, high: int, size: int) -> tuple[int, ...]:
        """``size`` different ids, in order."""
        while True:
            drawn = rng.integers(low, high, size=size).tolist()
            if len(set(drawn)) == size:
                return tuple(drawn)

    def example(rng: np.random.Generator) -> tuple[list[int], list[int]]:
        key_size = lambda: int(rng.integers(1, MOTIF + 1)) if training else MOTIF
        new_key = lambda: motif(rng, 0, keys, key_size())
        new_value = lambda: motif(rng, keys, vocab, int(rng.integers(1, MOTIF + 1)))
        probe, answer = new_key(), new_value()
        size = len(probe) + len(answer)
        value_of = {probe: answer}
        shown: set[tuple[int, ...]] = set()
        room = length - size - 2 * MOTIF
        # Early enough to be reached: the authors' bound, length - 2 size, at times leaves the probe out.
        place, placed = int(rng.integers(room - 2 * MOTIF + 1)), False
        tokens: list[int] = []
        targets: list[int] = []

        def add(key: tuple[int, ...], asked: bool) -> None:
            value = value_of[key]
            tokens.extend(key + value)
            targets.extend([NO_LOSS] * len(key) + (list(value) if asked else [NO_LOSS] * len(value)))
            shown.add(key)

        while len(tokens) < room:
            if len(tokens) >= place and not placed:
                add(probe, asked=False)
                placed = True
                continue
            key = new_key()
            if key not in value_of:
                value_of[key] = new_value()
            placed |= key == probe
            add(key, asked=key in shown)
        add(probe, asked=True)
        left = length + 1 - len(tokens)
        return [pad] * left + tokens, [NO_LOSS] * left + targets

    def make(rng: np.random.Generator) -> Examples:
        made = [example(rng) for _ in range(BLOCK)]
        tokens, answers = (np.array(part, np.int32) for part in zip(*made, strict=True))
        return tokens[:, :-1], (tokens if training else answers)[:, 1:]

    return make


def _memorization(config: Config, view: View) -> Make:
    insert, pairs = view.vocab_size - 1, view.seq_len // 2
    keys = (view.vocab_size - 1) // 2
    _require(config, view, pairs >= 1 and keys >= 1, "train.seq_len >= 2 and model.vocab_size >= 3")
    value_of = (keys + permutation(keys, MAP_SEED)).astype(np.int32)

    def make(rng: np.random.Generator) -> Examples:
        key = rng.integers(keys, size=(BLOCK, pairs), dtype=np.int32)
        tokens = np.stack([key, np.full_like(key, insert)], axis=2).reshape(BLOCK, -1)
        targets = no_targets(tokens)
        targets[:, 1::2] = value_of[key]
        return tokens, targets

    return make


def _selective_copying(config: Config, view: View) -> Make:
    copy, blank, copied, length = view.vocab_size - 1, view.vocab_size - 2, config.copied, view.seq_len
    blanks = length - 2 * copied - 1
    _require(config, view, blanks >= 1 and blank >= 1, f"train.seq_len > {2 * copied + 1}, 3 ids")

    def make(rng: np.random.Generator) -> Examples:
        wanted = rng.integers(blank, size=(BLOCK, copied), dtype=np.int32)
        tokens = np.full((BLOCK, length), blank, np.int32)
        before = np.sort(rng.integers(copied, size=(BLOCK, blanks)), axis=1)  # which token a blank precedes
        at = np.arange(copied) + (before[:, None, :] <= np.arange(copied)[None, :, None]).sum(axis=2)
        tokens[np.arange(BLOCK)[:, None], at] = wanted
        tokens[:, copied + blanks] = copy
        targets = no_targets(tokens)
        targets[:, -copied:] = wanted
        return tokens, targets

    return make


def _require(config: Config, view: View, met: bool, needs: str) -> None:
    if not met:
        given = f"here train.seq_len = {view.seq_len} and model.vocab_size = {view.vocab_size}"
        raise ConfigError("task", config.task, f"needs {needs}; {given}")


TASKS: dict[str, Callable[[Config, View], Make]] = {
    "in_context_recall": _recall,
    "noisy_in_context_recall": _recall,
    "fuzzy_in_context_recall": _fuzzy,
    "memorization": _memorization,
    "selective_copying": _selective_copying,
}
