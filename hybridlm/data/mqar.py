"""Data kind "mqar": multi-query associative recall, generated as it is read.

Arora et al. 2023, "Zoology" (arXiv 2312.04927), with the sampling of its published generator: n distinct keys
from [1, V/2) and n distinct values from [V/2, V), written k v k v ...; then each key once more as a query, at
an even distance 2 * gap behind the pairs, gaps drawn without replacement with p(gap = j - 1) ~ a * j^(a - 1),
j = 1 .. (length - 2n) / 2. The only targets are the values, each at its query key's own index; the next input
is filler, so no answer is ever fed back.
"""

import ast
import dataclasses
from typing import NamedTuple

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, draw_distinct, no_targets
from hybridlm.data.mixture import Mixture
from hybridlm.data.source import Source, View
from hybridlm.errors import ConfigError
from hybridlm.fields import Above


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """num_pairs: key-value pairs n of an example that fills a row of ``train.seq_len``.
    slices: instead, a mixture of lengths: "(length, pairs), ..." or "(length, pairs, weight), ...", weights
        being shares of the training rows. Examples shorter than a row are packed, each a document of its own.
    power_a: exponent a of the gaps; 1.0 is uniform, towards 0 queries crowd behind the pairs.
    random_non_queries: fill the unused query positions with tokens of the whole vocabulary rather than 0.
    train_examples, val_examples: of each slice; papers train on 20k to 100k.
    """

    num_pairs: int = 8
    slices: str = ""
    power_a: Above = 0.01
    random_non_queries: bool = True

    def check(self) -> None:
        if self.slices:
            _parse(self.slices)

    def open(self, view: View) -> Source:
        """The task, or a mixture of its slices."""
        sizes = _parse(self.slices) if self.slices else [Slice(view.seq_len, self.num_pairs)]
        field, value = ("slices", self.slices) if self.slices else ("num_pairs", self.num_pairs)
        for length, pairs, _ in sizes:
            for fits, needs in (
                (1 <= pairs <= length / 4, "1 <= pairs and 4 * pairs <= length"),
                (length <= view.seq_len, f"lengths up to train.seq_len = {view.seq_len}"),
                (length < view.vocab_size, f"length < model.vocab_size = {view.vocab_size}"),
            ):
                if not fits:
                    raise ConfigError(field, value, f"needs {needs}, here {length}")
        weights = {f"{length}x{pairs}": weight for length, pairs, weight in sizes}
        if len(weights) < len(sizes):
            raise ConfigError("slices", self.slices, "names a slice twice", "Give it one weight instead.")
        slices = [self._slice(length, pairs, view) for length, pairs, _ in sizes]
        if len(slices) == 1:
            return slices[0]
        return Mixture(dict(zip(weights, slices, strict=True)), weights, view)

    def _slice(self, length: int, pairs: int, view: View) -> Source:
        def make(rng: np.random.Generator) -> Examples:
            example = np.arange(BLOCK)[:, None]
            keys = draw_distinct(rng, 1, view.vocab_size // 2, pairs)
            values = draw_distinct(rng, view.vocab_size // 2, view.vocab_size, pairs)
            tokens = np.zeros((BLOCK, length), np.int32)
            targets = no_targets(tokens)
            tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
            # Exponential clocks of rate p ring in the order of draws without replacement (Efraimidis &
            # Spirakis 2006).
            j = np.arange(1, (length - 2 * pairs) // 2 + 1)
            clocks = rng.exponential(size=(BLOCK, len(j))) / (self.power_a * j ** (self.power_a - 1.0))
            query = 2 * pairs + 2 * np.argsort(clocks, axis=1)[:, :pairs]
            tokens[example, query], targets[example, query] = keys, values
            if self.random_non_queries:
                filler = rng.integers(view.vocab_size, size=tokens.shape, dtype=np.int32)
                tokens = np.where(tokens == 0, filler, tokens)
            return tokens, targets

        name = f"mqar with {pairs} pairs, power_a {self.power_a}, random filler {self.random_non_queries}"
        return Generated(make, view, self, name=name, length=length, entropy=(length, pairs))


class Slice(NamedTuple):
    length: int
    pairs: int
    weight: float = 1.0


def _parse(slices: str) -> list[Slice]:
    """Of "(64, 4), (128, 8, 0.5)"."""
    try:
        sizes = [Slice(*one) for one in ast.literal_eval(f"[{slices}]")]
        whole = all(isinstance(one.length, int) and isinstance(one.pairs, int) for one in sizes)
        if not sizes or not whole or min(one.weight for one in sizes) <= 0:
            raise ValueError
    except (ValueError, TypeError, SyntaxError) as error:
        allowed = 'must read like "(64, 4), (128, 8)" or, with weights, "(64, 4, 5), (128, 8, 1)"'
        raise ConfigError("slices", slices, allowed) from error
    return sizes
