"""When a run learnt a task: training tokens until it left the plateau, and until it reached 90%.

Runs of recall are bimodal: they guess for long, then know. A mean of their ends is a rate of success, so what
is told is when, of how many runs, and of the others how long they were looked at (right-censored).
"""

from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from eval import statistics
from hybridlm.report import quantity

HIGH = 0.9
Curve = Sequence[tuple[float, float]]  # (training tokens, accuracy), in order
RECORD = {"left": (float, type(None)), "reached": (float, type(None)), "followed": float}  # in eval.json


class Convergence(NamedTuple):
    """left: tokens at which the run left the plateau.  reached: at which it had `HIGH`.  None: censored.
    followed: tokens up to which it was looked at.  guess: accuracy of guessing.
    """

    left: float | None
    reached: float | None
    followed: float
    guess: float

    def __str__(self) -> str:
        when = lambda t: (
            f"not in {quantity(self.followed, '')} tokens" if t is None else f"at {quantity(t, '')} tokens"
        )
        return f"left the plateau {when(self.left)}, reached {HIGH:.0%} {when(self.reached)}"


def of(curve: Curve, guess: float | None) -> Convergence | None:
    """None for a curve without points. The plateau is left half way from guessing (None: 0) to 1."""
    if not curve:
        return None
    low = guess or 0.0
    return Convergence(first(curve, (1 + low) / 2), first(curve, HIGH), curve[-1][0], low)


def first(curve: Curve, level: float) -> float | None:
    """Tokens of the first evaluation at ``level`` or above that the next one, if there is any, confirms."""
    for (tokens, value), (_, following) in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if value >= level and following >= level:
            return tokens
    return None


class Times(NamedTuple):
    """Of several runs: how many got there, the Wilson interval of their share, and the median time.

    median: by Kaplan and Meier, which counts the others for as long as they were looked at; None where fewer
        than half got there.
    """

    events: int
    runs: int
    low: float
    high: float
    median: float | None


def times(found: Sequence[Convergence], what: str) -> Times:
    """what: "left" or "reached"."""
    events = [t for one in found if (t := getattr(one, what)) is not None]
    censored = [one.followed for one in found if getattr(one, what) is None]
    share = statistics.accuracy([1.0] * len(events) + [0.0] * len(censored))
    median = None
    if events:
        survival = stats.ecdf(stats.CensoredData(uncensored=events, right=censored)).sf
        passed = survival.quantiles[survival.probabilities <= 0.5 + 1e-9]
        median = float(passed[0]) if len(passed) else None
    return Times(len(events), len(found), share.low, share.high, median)
