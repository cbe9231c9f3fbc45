"""Rows of several sources in fixed proportions, each row's origin a function of its index."""

import dataclasses
import functools

import numpy as np

from hybridlm.data import source
from hybridlm.data.source import Batch, Source, View, empty_rows, permutation
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.fields import Named, under

BLOCK = 4096  # rows within which the proportions are met exactly


@dataclasses.dataclass(frozen=True)
class Config(source.Config):
    """components: settings of other data by name, each with its weight."""

    components: Named[source.Config] = Named()  # noqa: RUF009  # nobody changes it

    def load_tokenizer(self) -> Tokenizer | None:
        each = [component.load_tokenizer() for component in self.components.values()]
        return next((tokens for tokens in each if tokens is not None), None)

    def check(self) -> None:
        if not self.components:
            allowed = "must name the parts of the mixture, each with kind and weight"
            raise ConfigError("components", {}, allowed)
        for name, component in self.components.items():
            with under(f"components.{name}"):
                component.check()

    def open(self, view: View) -> "Mixture":
        sources = {}
        for name, component in self.components.items():
            with under(f"components.{name}"):
                sources[name] = component.open(view)
        return Mixture(sources, {name: one.weight for name, one in self.components.items()}, view)


class Mixture:
    """Source that takes each row from one of ``components``.

    weights: shares of the training rows (and so of tokens, padding included), in any unit. Every BLOCK rows
        hold them exactly, rounded to 1/BLOCK, in an order shuffled by the seed; a component starts its next
        epoch when its rows run out, without regard to the others.
    Validation is one pass over all held-out rows, spread evenly; weights have no part in it.
    """

    def __init__(self, components: dict[str, Source], weights: dict[str, float], view: View):
        self.names, self.sources, self.view = list(components), list(components.values()), view
        self.counts = _round([weights[name] for name in self.names], self.names)
        self.vocab_size = max(one.vocab_size for one in self.sources)
        tokenizers = {s.tokenizer.fingerprint: s.tokenizer for s in self.sources if s.tokenizer is not None}
        if len(tokenizers) > 1:
            named = ", ".join(tokenizer.name for tokenizer in tokenizers.values())
            raise ConfigError(
                "components", named, "must share one tokenizer", "Prepare them with the same file."
            )
        # Beside tokens that stand for no text there is no bits per byte, so such a mixture has no tokenizer.
        self.tokenizer = None if any(s.tokenizer is None for s in self.sources) else tokenizers.popitem()[1]
        self.num_rows = sum(one.num_rows or 0 for one in self.sources) if view.split == "val" else None
        parts = ", ".join(
            f"{n} {c} {s.fingerprint}" for n, c, s in zip(self.names, self.counts, self.sources, strict=True)
        )
        self.fingerprint = f"{parts} {view.split} {view.seed}"
        self.checks = [check for one in self.sources for check in one.checks]
        self._block = functools.lru_cache(maxsize=2)(self._shuffle)

    def describe(self) -> str:
        return "; ".join(
            f"{name} ({count / BLOCK:.1%}): {one.describe()}"
            for name, count, one in zip(self.names, self.counts, self.sources, strict=True)
        )

    def epochs(self, rows: float) -> dict[str, float]:
        """How often ``rows`` training rows read each component that has an end."""
        each = zip(self.names, self.counts, self.sources, strict=True)
        return {name: rows * count / BLOCK / one.num_rows for name, count, one in each if one.num_rows}

    def _places(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The component of each row, and its index there."""
        origin_B, place_B = np.empty(len(index_B), np.int64), np.empty(len(index_B), np.int64)
        for b, index in enumerate(index_B.tolist()):
            block, place = (0, index) if self.view.split == "val" else divmod(index, BLOCK)
            origins, ranks = self._block(block)
            origin_B[b] = origins[place]
            place_B[b] = ranks[place] + block * self.counts[origins[place]]
        return origin_B, place_B

    def ids(self, index_B: np.ndarray) -> list[str]:
        places = zip(*self._places(index_B), strict=True)
        return [f"{self.names[c]}: {self.sources[c].ids(np.array([place]))[0]}" for c, place in places]

    def rows(self, index_B: np.ndarray) -> Batch:
        origin_B, place_B = self._places(index_B)
        batch = empty_rows(len(index_B), self.view.seq_len)
        for c, one in enumerate(self.sources):
            if (chosen := origin_B == c).any():
                for name, array in one.rows(place_B[chosen]).items():
                    batch[name][chosen] = array
        return batch

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The component of each row of a block, and how many rows of that component come before it there."""
        if self.view.split == "val":
            counts = [one.num_rows or 0 for one in self.sources]
            order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind="stable")
        else:
            counts, order = self.counts, permutation(BLOCK, self.view.seed, block)
        origins = np.repeat(np.arange(len(counts)), counts)[order]
        ranks = np.empty_like(origins)
        for c, count in enumerate(counts):
            ranks[origins == c] = np.arange(count)
        return origins, ranks


def _round(weights: list[float], names: list[str]) -> list[int]:
    """Rows of each component in a block: shares of BLOCK by largest remainder."""
    shares = np.array(weights, np.float64) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(int)
    largest = np.argsort(counts - shares, kind="stable")[: BLOCK - counts.sum()]
    counts[largest] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if count == 0:
            allowed = f"must be at least 1/{BLOCK} of the sum of all weights"
            raise ConfigError(f"components.{name}.weight", weight, allowed, "Raise it, or leave it out.")
    return counts.tolist()
