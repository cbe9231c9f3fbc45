"""Accuracies with their uncertainty."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # of a 95% interval


class Accuracy(NamedTuple):
    """A mean of scores in [0, 1] over ``samples`` independent samples, and its 95% interval."""

    mean: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.samples}"


def accuracy(scores: Sequence[float]) -> Accuracy:
    """Mean of ``scores`` with its Wilson interval.

    Scores between 0 and 1 (several answers to a sample) vary less than those that are 0 or 1 with the same
    mean, so that the interval is then too wide rather than too narrow.
    """
    n = len(scores)
    if n == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    mean = math.fsum(scores) / n
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Accuracy(mean, max(0.0, centre - half), min(1.0, centre + half), n)
