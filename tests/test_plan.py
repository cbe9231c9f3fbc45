"""The planner keeps the layers, finds the cheapest plan, and says which layers are in each stack."""

import itertools
import random
import time

import pytest

from hybridlm import pattern
from hybridlm.plan import Plan, plan


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("kda*3 full", 32, "(kda*3 full)*8"),
        ("kda*3 full", 30, "(kda*3 full)*7 kda*2"),
        ("kda", 24, "kda*24"),
        ("full", 1, "full"),
        ("kda full", 7, "(kda full)*3 kda"),
        ("swa (kda*3 full)*6", 0, "swa (kda*3 full)*6"),  # first layer apart
        ("(kda*3 full)*6 kda*2 full", 0, "(kda*3 full)*6 kda*2 full"),  # last layer full: Kimi Linear's 27
        ("kda*3 full", 14, "(kda*3 full)*3 kda*2"),
        ("a b c d", 0, "a b c d"),
        ("d f d*10 f d*11", 0, "(d f d*9)*2 d*2"),
    ],
)
def test_plan(text: str, layers: int, expected: str) -> None:
    assert str(plan(pattern.fill(pattern.parse(text), layers))) == expected


def cheapest(names: tuple[str, ...]) -> tuple[int, int]:
    """Fewest (runs, segments) over every head, period and number of repeats, by plain enumeration."""

    def traced(part: tuple[str, ...]) -> int:
        return len(list(itertools.groupby(part)))

    n, best = len(names), (len(names) + 1, 9)
    for head, period in itertools.product(range(n), range(1, n + 1)):
        for repeats in range(1, (n - head) // period + 1):
            stop = head + period * repeats
            if names[head:stop] == names[head : head + period] * repeats:
                parts = (names[:head], names[head : head + period], names[stop:])
                best = min(best, (sum(map(traced, parts)), sum(map(bool, parts))))
    return best


def test_random_stacks() -> None:
    rng = random.Random(0)
    for trial in range(300):
        period = [rng.choice("ab") for _ in range(rng.randint(1, 5))]
        head = [rng.choice("abc") for _ in range(rng.randint(0, 2))]
        names = tuple((head + period * 9)[: rng.randint(1, 16)])
        if trial % 3 == 0:
            names = (*names[:-1], "c")
        planned = plan(names)
        assert planned.items() == names
        assert planned.num_layers == len(names)
        assert (num_runs(planned), len(planned.segments)) == cheapest(names), names
        assert pattern.parse(str(planned)) == names
        check_places(planned, names)


def num_runs(planned: Plan) -> int:
    """Layers that are traced."""
    return sum(len(segment.runs) for segment in planned.segments)


def check_places(planned: Plan, names: tuple[str, ...]) -> None:
    """Every layer stands once, in a stack of its own item, in an order that the scans go through."""
    order = []
    for segment, table in zip(planned.segments, planned.indices(), strict=True):
        for repeat in range(segment.repeats):
            for run, indices in zip(segment.runs, table, strict=True):
                assert indices.shape == (segment.repeats, run.length)
                assert {names[index] for index in indices[repeat]} == {run.item}
                order += indices[repeat].tolist()
    assert order == list(range(len(names)))


def test_runs_do_not_grow_with_depth() -> None:
    for text in ("kda*3 full", "full kda*6", "kda*2 swa full"):
        names = pattern.parse(text)
        counts = [num_runs(plan(pattern.fill(names, depth))) for depth in range(8, 128, len(names))]
        assert counts == sorted(counts, reverse=True), text


def test_fast_for_deep_stacks() -> None:
    rng = random.Random(0)
    names = [rng.choice("ab") for _ in range(1024)]
    start = time.perf_counter()
    plan(names)
    assert time.perf_counter() - start < 1
