"""Data kind "state_tracking": word problems of a finite group (Merrill et al. 2024, arXiv 2404.08819).

Tokens are elements of the group, uniform and independent; the target at every position is the product of all
elements up to and including it. Parity is the group of two elements, whose solution needs one negative
eigenvalue (Grazzi et al. 2024, arXiv 2411.12537); S5 and A5 are not solvable. DeltaProduct (arXiv 2502.10297)
trains at length 128 and tests up to 512.

Ids are ranks in lexicographic order of the permutations (0 is the identity), and
(p * q)(i) = q(p(i)): what comes first acts first.
"""

import dataclasses
import functools
import itertools

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, need
from hybridlm.data.source import View
from hybridlm.errors import ConfigError, one_of

GROUPS = {"parity": (2, False), "S3": (3, False), "S4": (4, False), "A5": (5, True), "S5": (5, False)}


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """group: parity, S3, S4, A5 or S5.
    only_swaps: draw from the identity and the exchanges of two points, which generate the group; one
        reflection a token then suffices (arXiv 2411.12537).
    train_examples: 100k in DeltaProduct.
    """

    group: str = "S3"
    only_swaps: bool = False

    def check(self) -> None:
        one_of("group", self.group, GROUPS)
        if self.only_swaps and GROUPS[self.group][1]:
            raise ConfigError("only_swaps", True, f"{self.group} has no exchange of two points")

    def open(self, view: View) -> Generated:
        group, length, table = self.group, view.seq_len, multiplication(self.group)
        need(view, "kind", group, vocab_size=len(table))
        drawn = swaps(group) if self.only_swaps else np.arange(len(table), dtype=np.int32)

        def make(rng: np.random.Generator) -> Examples:
            tokens = drawn[rng.integers(len(drawn), size=(BLOCK, length), dtype=np.int32)]
            targets = np.empty_like(tokens)
            product = np.zeros(BLOCK, np.int32)
            for t in range(length):
                targets[:, t] = product = table[product, tokens[:, t]]
            return tokens, targets

        name, entropy = group + ("-swaps" if self.only_swaps else ""), (3, list(GROUPS).index(group), length)
        return Generated(make, view, self, name=name, length=length, entropy=entropy)


@functools.cache
def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of ``group`` in the order of their ids."""
    points, even_only = GROUPS[group]
    inversions = lambda p: sum(a > b for a, b in itertools.combinations(p, 2))
    return [p for p in itertools.permutations(range(points)) if not even_only or inversions(p) % 2 == 0]


def swaps(group: str) -> np.ndarray:
    """int32 ids of the permutations of ``group`` that move two points or none."""
    moved = [sum(point != place for place, point in enumerate(p)) for p in elements(group)]
    return np.array([i for i, count in enumerate(moved) if count in (0, 2)], np.int32)


@functools.cache
def multiplication(group: str) -> np.ndarray:
    """int32 [order, order]: the id of a * b, a first."""
    permutations = elements(group)
    index = {p: i for i, p in enumerate(permutations)}
    product = lambda p, q: index[tuple(q[point] for point in p)]
    return np.array([[product(p, q) for q in permutations] for p in permutations], np.int32)
