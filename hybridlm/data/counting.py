"""Data kind "counting": how often the last token has come.

Yehudai et al. 2024, "When can transformers count to n?" (arXiv 2407.15160), query count: ``elements``
uniform draws from ``ids`` ids behind a begin mark; the one target, at the last element, is how many of them
equal it, itself included. The mark gives a softmax something to weigh equal tokens against; without one it
sees only shares. A model as wide as there are ids can keep a counter for each; below that it is held to
break. An answer that is always the most frequent count is right with `constant`.
"""

import dataclasses
import math

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, need, no_targets
from hybridlm.data.source import View
from hybridlm.fields import Positive


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """elements: of an example, beside the mark.
    ids: that they are drawn from; 32 for 64 elements in the paper.
    """

    elements: Positive = 64
    ids: Positive = 32

    def open(self, view: View) -> Generated:
        elements, ids = self.elements, self.ids
        need(view, "kind", "counting", vocab_size=1 + ids + elements)
        need(view, "elements", elements, seq_len=length(elements))

        def make(rng: np.random.Generator) -> Examples:
            """The mark is 0, elements are 1 .. ids, a count of c is ids + c."""
            tokens = np.zeros((BLOCK, length(elements)), np.int32)
            tokens[:, 1:] = rng.integers(1, ids + 1, size=(BLOCK, elements))
            targets = no_targets(tokens)
            targets[:, -1] = ids + (tokens == tokens[:, -1:]).sum(axis=1)
            return tokens, targets

        name, entropy = f"counts among {elements} of {ids} ids", (8, elements, ids)
        return Generated(make, view, self, name=name, length=length(elements), entropy=entropy)


def length(elements: int) -> int:
    """Tokens of an example."""
    return 1 + elements


def constant(elements: int, ids: int) -> float:
    """Share of examples whose count is the most frequent one: 1 + Binomial(elements - 1, 1 / ids)."""
    n, p = elements - 1, 1 / ids
    mode = min(n, math.floor((n + 1) * p))
    return math.comb(n, mode) * p**mode * (1 - p) ** (n - mode)
