"""Runs against each other on the same samples.

Samples are functions of (seed, task, length, index), so two runs that were asked the same differ sample by
sample, which tells more than two intervals do (Miller 2024, arXiv 2411.00640). A sample that has several
turns or answers is one sample with one score.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from eval.runner import Result
from eval.statistics import Z

LEVEL = 0.05  # of the family of all comparisons of a run with the baseline
OF_THE_RUN = {"step", "checkpoint", "ends"}  # of a result's identity: what two runs need not have in common
GRID = 2520  # to which differences are rounded: exact for shares of up to ten answers


class Difference(NamedTuple):
    """mean: of the scores, the run's less the baseline's.  low, high: its 95% interval.
    p: of no difference, two-sided.  holm: the same, corrected for all comparisons of the run.
    """

    mean: float
    low: float
    high: float
    p: float
    holm: float = math.nan

    @property
    def told(self) -> bool:
        """Whether the runs can be told apart."""
        return self.holm < LEVEL


def difference(run: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Of scores in [0, 1] of the same samples.

    p: all flips of the differences' signs; for scores of 0 and 1 that is McNemar's exact test. Interval:
    Agresti and Min's (2005) for 0 and 1, two samples added; shares vary less, so that for them it is too wide
    rather than too narrow.
    """
    change = np.asarray(run, np.float64) - np.asarray(baseline, np.float64)
    count = len(change)
    centre = change.sum() / (count + 2)
    spread = ((change**2).sum() + 1) / (count + 2) - centre**2
    half = Z * math.sqrt(spread / (count + 2))
    mean = float(change.mean())
    low, high = max(-1.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))
    return Difference(mean, low, high, _p(change))


def _p(change: np.ndarray) -> float:
    """The share of all ways to flip the signs of ``change`` whose sum is as far from 0, counted exactly."""
    whole = np.rint(change * GRID).astype(np.int64)
    moved = whole[whole != 0]
    if not len(moved):
        return 1.0
    moved = moved // np.gcd.reduce(moved)
    reach = int(np.abs(moved).sum())
    chance = np.zeros(2 * reach + 1)  # of each sum, -reach .. reach, of the changes so far
    chance[reach] = 1.0
    for step in np.abs(moved):
        chance = (np.roll(chance, step) + np.roll(chance, -step)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(moved.sum())
    return min(1.0, float(chance[far].sum()))


def holm(found: dict[str, Difference]) -> dict[str, Difference]:
    """``found`` with p corrected for their number (Holm 1979)."""
    ordered = sorted(found, key=lambda name: found[name].p)
    corrected, least = {}, 0.0
    for rank, name in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - rank) * found[name].p))
        corrected[name] = found[name]._replace(holm=least)
    return {name: corrected[name] for name in found}


def unlike(run: Result, baseline: Result) -> str:
    """Why two results are not of the same samples; "" if they are."""
    if "scores" not in run or "scores" not in baseline:
        return "measured by an older version, without the scores of samples"
    mine, theirs = run["identity"], baseline["identity"]
    names = (mine | theirs).keys() - OF_THE_RUN
    differing = [name for name in names if mine.get(name) != theirs.get(name)]
    if differing:
        return f"another {', '.join(sorted(differing))}"
    return "" if len(run["scores"]) == len(baseline["scores"]) else "another number of samples"


def differences(
    run: dict[str, Result], baseline: dict[str, Result]
) -> tuple[dict[str, Difference], dict[str, str]]:
    """("task@length" -> Difference, "task@length" -> why there is none) of what both have."""
    found, refused = {}, {}
    for name in run:
        if name not in baseline:
            continue
        if why := unlike(run[name], baseline[name]):
            refused[name] = why
        else:
            found[name] = difference(run[name]["scores"], baseline[name]["scores"])
    return holm(found), refused


def detectable(samples: int, share: float = 0.5) -> float:
    """The difference that ``samples`` tell with a power of 80% if ``share`` of them change either way."""
    return float((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * math.sqrt(share / samples))
