"""How a list of layers is planned as head, repeated period, tail, so that it can be scanned.

A plan is a tuple of segments. A segment repeats a tuple of runs; a run is a number of equal neighbours. The
model traces each run once: a segment is a scan over its repeats, a run a scan over its length. What a plan
costs to compile is therefore the number of its runs, whatever the depth:

    32 layers of kda*3 full   ->   (kda*3 full)*8            one segment, two runs
    30 layers of kda*3 full   ->   the same, with the last two layers absent: still two runs
    14 layers of kda*3 full   ->   (kda*3 full)*3 kda*2      two segments, three runs

Absent layers are skipped at run time (a conditional in the loop), but their slots in the parameter stacks
exist, as zeros; so a repetition is left incomplete only where that wastes at most MAX_ABSENT of the layers.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

MAX_ABSENT = 0.1  # of the stack's layers


class Run(NamedTuple):
    """``length`` neighbouring layers of the mixer ``name``."""

    name: str
    length: int

    def __str__(self) -> str:
        return self.name if self.length == 1 else f"{self.name}*{self.length}"


class Segment(NamedTuple):
    """``runs``, one after the other, ``repeats`` times.

    absent: places in the period (0 is its first layer) that the last repetition leaves out.
    """

    repeats: int
    runs: tuple[Run, ...]
    absent: tuple[int, ...] = ()

    @property
    def period(self) -> int:
        """Layers in one repetition."""
        return sum(run.length for run in self.runs)

    @property
    def num_layers(self) -> int:
        return self.repeats * self.period - len(self.absent)

    def last(self) -> tuple[Run, ...]:
        """The runs of the last repetition."""
        names = [run.name for run in self.runs for _ in range(run.length)]
        return runs(name for place, name in enumerate(names) if place not in self.absent)

    def __str__(self) -> str:
        text = " ".join(map(str, self.runs))
        whole = self.repeats - bool(self.absent)
        repeated = text if whole == 1 else f"({text})*{whole}"
        return " ".join([repeated, *map(str, self.last())]) if self.absent else repeated


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
        return sum(segment.num_layers for segment in self.segments)

    @property
    def num_runs(self) -> int:
        """Layers that are traced."""
        return sum(len(segment.runs) for segment in self.segments)

    def names(self) -> tuple[str, ...]:
        """The mixer name of every layer, in order."""
        whole = [
            run for segment in self.segments for run in segment.runs * (segment.repeats - 1) + segment.last()
        ]
        return tuple(run.name for run in whole for _ in range(run.length))

    def places(self) -> list[Place]:
        """The place of layer 0, 1, ..."""
        found: dict[int, Place] = {}
        for s, segment_runs in enumerate(run_indices(self)):
            for r, (_, indices) in enumerate(segment_runs):
                found |= {
                    int(layer): Place(s, r, *place) for place, layer in np.ndenumerate(indices) if layer >= 0
                }
        return [found[layer] for layer in range(self.num_layers)]

    def __str__(self) -> str:
        return " ".join(map(str, self.segments))


def run_indices(layout: Layout) -> list[list[tuple[Run, np.ndarray]]]:
    """For every segment, its runs, each with the layer indices of its stack: int array [repeats, length].

    -1 marks an absent layer.
    """
    result: list[list[tuple[Run, np.ndarray]]] = []
    start = 0
    for segment in layout.segments:
        present = np.ones((segment.repeats, segment.period), bool)
        present[-1, list(segment.absent)] = False
        table = np.where(present, start - 1 + np.cumsum(present).reshape(present.shape), -1)
        splits = np.cumsum([run.length for run in segment.runs])[:-1]
        result.append(list(zip(segment.runs, np.split(table, splits, axis=1), strict=True)))
        start += segment.num_layers
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


def missing(part: Sequence[str], whole: Sequence[str]) -> tuple[int, ...] | None:
    """Which items of ``whole`` to leave out to get ``part``; None where no choice does."""
    absent, taken = [], 0
    for place, name in enumerate(whole):
        if taken < len(part) and part[taken] == name:
            taken += 1
        else:
            absent.append(place)
    return tuple(absent) if taken == len(part) else None


def plan(names: Sequence[str]) -> Layout:
    """The layout of ``names`` with the fewest runs, then the fewest absent layers, then the fewest segments.

    Tries every head and period, quadratic in depth (milliseconds for 128 layers). Only maximal repetition is
    considered: shortening it can only lengthen the tail. A tail that is a repetition with layers left out
    becomes one, within MAX_ABSENT.
    """
    n = len(names)
    changes = np.cumsum([0] + [names[i] != names[i - 1] for i in range(1, n)]).tolist()

    def count(start: int, stop: int) -> int:
        """Runs in names[start:stop]."""
        return changes[stop - 1] - changes[start] + 1 if stop > start else 0

    def segment(repeats: int, start: int, stop: int, absent: tuple[int, ...] = ()) -> tuple[Segment, ...]:
        return (Segment(repeats, runs(names[start:stop]), absent),) if stop > start else ()

    best = (count(0, n), 0, 1, -n - 1, 0, 0)  # one segment, no repetition: kept unless repetition saves runs
    layout = Layout(segment(1, 0, n))
    for period in range(1, n // 2 + 1):
        agree = 0  # names[head:] equals names[head + period:] for this many layers
        for head in range(n - period - 1, -1, -1):
            agree = agree + 1 if names[head] == names[head + period] else 0
            repeats = agree // period + 1
            if repeats == 1:
                continue
            body_end, stop = head + period, head + repeats * period
            traced = count(0, head) + count(head, body_end)
            absent = missing(names[stop:], names[head:body_end]) if stop < n else None
            if absent is not None and len(absent) <= MAX_ABSENT * n:
                score = (traced, len(absent), 1 + (head > 0), head - stop, head, period)
                segments = segment(1, 0, head) + segment(repeats + 1, head, body_end, absent)
            else:
                score = (traced + count(stop, n), 0, 1 + (head > 0) + (stop < n), head - stop, head, period)
                segments = segment(1, 0, head) + segment(repeats, head, body_end) + segment(1, stop, n)
            if score < best:
                best, layout = score, Layout(segments)
    return layout
