"""How a list of layers is planned as head, repeated period, tail, so that it can be scanned.

A plan is a tuple of segments. A segment repeats a tuple of runs; a run is a number of equal neighbours. The
model traces each run once: a segment is a scan over its repeats, a run a scan over its length. What a plan
costs to compile is therefore the number of its runs, whatever the depth:

    30 layers of kda*3 full   ->   (kda*3 full)*7 kda*2      two segments, three runs
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """``length`` neighbouring layers of the mixer ``name``."""

    name: str
    length: int

    def __str__(self) -> str:
        return self.name if self.length == 1 else f"{self.name}*{self.length}"


class Segment(NamedTuple):
    """``runs``, one after the other, ``repeats`` times."""

    repeats: int
    runs: tuple[Run, ...]

    @property
    def period(self) -> int:
        """Layers in one repetition."""
        return sum(run.length for run in self.runs)

    def __str__(self) -> str:
        text = " ".join(map(str, self.runs))
        return text if self.repeats == 1 else f"({text})*{self.repeats}"


class Place(NamedTuple):
    """Where a layer's parameters are: segment, run in it, index [repeat, offset] in the run's stack."""

    segment: int
    run: int
    repeat: int
    offset: int


class Layout(NamedTuple):
    """Segments in layer order. ``str(layout)`` is a pattern that parses back to the same layers."""

    segments: tuple[Segment, ...]

    @property
    def num_layers(self) -> int:
        return sum(segment.repeats * segment.period for segment in self.segments)

    @property
    def num_runs(self) -> int:
        """Layers that are traced."""
        return sum(len(segment.runs) for segment in self.segments)

    def names(self) -> tuple[str, ...]:
        """The mixer name of every layer, in order."""
        return tuple(
            run.name
            for segment in self.segments
            for _ in range(segment.repeats)
            for run in segment.runs
            for _ in range(run.length)
        )

    def places(self) -> Iterator[Place]:
        """The place of layer 0, 1, ..."""
        for s, segment in enumerate(self.segments):
            for repeat in range(segment.repeats):
                for r, run in enumerate(segment.runs):
                    for offset in range(run.length):
                        yield Place(s, r, repeat, offset)

    def __str__(self) -> str:
        return " ".join(map(str, self.segments))


def run_indices(layout: Layout) -> list[list[tuple[Run, np.ndarray]]]:
    """For every segment, its runs, each with the layer indices of its stack: int array [repeats, length]."""
    result: list[list[tuple[Run, np.ndarray]]] = []
    start = 0
    for segment in layout.segments:
        repeat_starts = start + segment.period * np.arange(segment.repeats)
        runs = []
        for run in segment.runs:
            runs.append((run, repeat_starts[:, None] + np.arange(run.length)))
            repeat_starts = repeat_starts + run.length
        result.append(runs)
        start += segment.repeats * segment.period
    return result


def runs(names: Iterable[str]) -> tuple[Run, ...]:
    """Equal neighbours gathered."""
    result: list[Run] = []
    for name in names:
        if result and result[-1].name == name:
            result[-1] = Run(name, result[-1].length + 1)
        else:
            result.append(Run(name, 1))
    return tuple(result)


def plan(names: Sequence[str]) -> Layout:
    """The layout of ``names`` with the fewest runs, then the fewest segments, then the longest repeated part.

    Tries every head and period, quadratic in depth (milliseconds for 128 layers). Only maximal repetition is
    considered: shortening it can only lengthen the tail.
    """
    n = len(names)
    changes = np.cumsum([0] + [names[i] != names[i - 1] for i in range(1, n)]).tolist()

    def count(start: int, stop: int) -> int:
        """Runs in names[start:stop]."""
        return changes[stop - 1] - changes[start] + 1 if stop > start else 0

    best = (count(0, n), 1, -n - 1, 0, 0)  # one segment, no repetition: kept unless repetition saves runs
    choice = (0, n, 1)
    for period in range(1, n // 2 + 1):
        agree = 0  # names[head:] equals names[head + period:] for this many layers
        for head in range(n - period - 1, -1, -1):
            agree = agree + 1 if names[head] == names[head + period] else 0
            repeats = agree // period + 1
            if repeats == 1:
                continue
            stop = head + repeats * period
            traced = count(0, head) + count(head, head + period) + count(stop, n)
            segments = 1 + (head > 0) + (stop < n)
            score = (traced, segments, head - stop, head, period)
            if score < best:
                best, choice = score, (head, period, repeats)
    head, period, repeats = choice
    stop = head + repeats * period
    body = Segment(repeats, runs(names[head : head + period]))
    parts = (Segment(1, runs(names[:head])), body, Segment(1, runs(names[stop:])))
    return Layout(tuple(part for part in parts if part.runs))
