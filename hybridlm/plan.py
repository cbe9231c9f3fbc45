"""How a list of layers is planned as head, repeated period, tail, so that it can be scanned.

A plan is a tuple of segments. A segment repeats a tuple of runs; a run is a number of equal neighbours. The
stack traces each run once: a segment is a scan over its repeats, a run a scan over its length. What a plan
costs to compile is therefore the number of its runs, whatever the depth:

    32 layers of kda*3 full   ->   (kda*3 full)*8            one segment, two runs
    30 layers of kda*3 full   ->   (kda*3 full)*7 kda*2      two segments, three runs
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Run(NamedTuple):
    """``length`` neighbouring layers that are equal to ``item``, hashable, whose str() is their name."""

    item: Any
    length: int

    def __str__(self) -> str:
        return str(self.item) if self.length == 1 else f"{self.item}*{self.length}"


class Segment(NamedTuple):
    """``runs``, one after the other, ``repeats`` times."""

    repeats: int
    runs: tuple[Run, ...]

    @property
    def num_layers(self) -> int:
        return self.repeats * sum(run.length for run in self.runs)

    def __str__(self) -> str:
        text = " ".join(map(str, self.runs))
        return text if self.repeats == 1 else f"({text})*{self.repeats}"


class Plan(NamedTuple):
    """Segments in layer order. ``str(plan)`` is a pattern that parses back to the same layers."""

    segments: tuple[Segment, ...]

    @property
    def num_layers(self) -> int:
        return sum(segment.num_layers for segment in self.segments)

    def items(self) -> tuple[Hashable, ...]:
        """The item of every layer, in order."""
        runs = [run for segment in self.segments for run in segment.runs * segment.repeats]
        return tuple(run.item for run in runs for _ in range(run.length))

    def indices(self) -> list[list[np.ndarray]]:
        """For every segment and run the layer indices of its stack: int array [repeats, length]."""
        result: list[list[np.ndarray]] = []
        start = 0
        for segment in self.segments:
            table = start + np.arange(segment.num_layers).reshape(segment.repeats, -1)
            splits = np.cumsum([run.length for run in segment.runs])[:-1]
            result.append(np.split(table, splits, axis=1))
            start += segment.num_layers
        return result

    def __str__(self) -> str:
        return " ".join(map(str, self.segments))


def runs(items: Iterable[Hashable]) -> tuple[Run, ...]:
    """Equal neighbours gathered."""
    return tuple(Run(item, len(list(equal))) for item, equal in itertools.groupby(items))


def like(layout: Plan, items: Sequence[Hashable]) -> Plan:
    """The plan of ``items`` with the segments and runs of ``layout``, where that is of as many and those of
    each of its runs are equal; else `plan`."""
    if layout.num_layers != len(items):
        return plan(items)
    segments = []
    for segment, table in zip(layout.segments, layout.indices(), strict=True):
        found = [list(dict.fromkeys(items[i] for i in indices.flat)) for indices in table]
        if any(len(distinct) > 1 for distinct in found):
            return plan(items)
        own = (run._replace(item=item) for run, (item,) in zip(segment.runs, found, strict=True))
        segments.append(segment._replace(runs=tuple(own)))
    return Plan(tuple(segments))


def plan(items: Sequence[Hashable]) -> Plan:
    """The plan of ``items``, one a layer, with the fewest runs, then the fewest segments, the longest body.

    Tries every period and, at once, every head before it: milliseconds for a thousand layers. Only maximal
    repetition is considered: shortening it can only lengthen the tail.
    """
    n = len(items)
    numbers = {item: number for number, item in enumerate(dict.fromkeys(items))}
    ids = np.array([numbers[item] for item in items])
    changes = np.concatenate([[0, 0], np.cumsum(ids[1:] != ids[:-1])])  # [i]: changes before item i - 1

    def count(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Runs in items[start:stop]."""
        return np.where(stop > start, changes[stop] - changes[np.minimum(start + 1, n)] + 1, 0)

    whole = np.array([0]), np.array([n])
    best, cut = (int(count(*whole)[0]), 1, -n - 1, 0, 0), (0, n, n)  # one segment: kept unless runs are saved
    for period in range(1, n // 2 + 1):
        differs = np.append(np.flatnonzero(ids[:-period] != ids[period:]), n - period)
        heads = np.arange(n - period)
        # Items from a head on that recur a period on.
        agree = differs[np.searchsorted(differs, heads)] - heads
        repeats = agree // period + 1
        heads, repeats = heads[repeats > 1], repeats[repeats > 1]
        if not len(heads):
            continue
        ends = np.full_like(heads, n)
        stops = heads + repeats * period
        traced = count(np.zeros_like(heads), heads) + count(heads, heads + period) + count(stops, ends)
        segments = 1 + (heads > 0) + (stops < n)
        first = np.lexsort((heads, heads - stops, segments, traced))[0]
        head, stop = int(heads[first]), int(stops[first])
        found = int(traced[first]), int(segments[first]), head - stop, head, period
        if found < best:
            best, cut = found, (head, period, stop)
    head, period, stop = cut
    parts = (1, items[:head]), ((stop - head) // period, items[head : head + period]), (1, items[stop:])
    return Plan(tuple(Segment(repeats, runs(part)) for repeats, part in parts if len(part)))
