"""Patterns: what they spell, where they fail, and what a ratio means."""

import random

import pytest

from hybridlm import pattern
from hybridlm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kda", "kda"),
        ("kda*3 full", "kda kda kda full"),
        ("(kda*2 full)*2 swa", "kda kda full kda kda full swa"),
        ("((a b)*2 c)*2", "a b a b c a b a b c"),
        ("  a *\t2 ( b )\nc ", "a a b c"),
        ("a(b c)d", "a b c d"),
        ("_x9*1", "_x9"),
    ],
)
def test_parse(text: str, names: str) -> None:
    assert pattern.parse(text) == tuple(names.split())


def random_pattern(rng: random.Random, depth: int) -> tuple[str, list[str]]:
    """A random pattern text beside the list it must expand to."""
    texts, names = [], []
    for _ in range(rng.randint(1, 3)):
        if depth and rng.random() < 0.5:
            text, inner = random_pattern(rng, depth - 1)
            text = f"({text})"
        else:
            text = rng.choice(["kda", "full", "x_1"])
            inner = [text]
        if rng.random() < 0.5:
            count = rng.randint(1, 4)
            text, inner = f"{text}{' ' * rng.randint(0, 1)}*{count}", inner * count
        texts.append(text)
        names += inner
    return " ".join(texts), names


def test_random_patterns() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text, names = random_pattern(rng, depth=3)
        assert list(pattern.parse(text, {"kda", "full", "x_1"})) == names, text


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("", 0, "names no layer"),
        ("   ", 0, "names no layer"),
        ("kda*3 ful", 6, "no mixer named 'ful'"),
        ("kda*3 full)", 10, "')' without '('"),
        ("kda (full kda", 4, "'(' is never closed"),
        ("kda ()*2", 5, "nothing between"),
        ("kda*0", 4, "whole number >= 1"),
        ("kda*-1", 4, "whole number >= 1"),
        ("kda*", 4, "whole number >= 1"),
        ("kda*two", 4, "whole number >= 1"),
        ("kda*2*2", 5, "must follow a name"),
        ("*3 kda", 0, "must follow a name"),
        ("3 kda", 0, "expected a name"),
        ("kda, full", 3, "expected a name"),
        ("kda*5000", 4, "more than 4096 layers"),
        ("((kda*99)*99)*99 full", 10, "more than 4096 layers"),
    ],
)
def test_error_points_at_the_character(text: str, position: int, problem: str) -> None:
    with pytest.raises(pattern.PatternError, match=r"model\.pattern") as caught:
        pattern.parse(text, {"kda", "full"})
    assert problem in str(caught.value)
    assert caught.value.position == position
    shown, caret = str(caught.value).splitlines()[-2:]
    assert shown[2:] == text
    assert caret == " " * (2 + position) + "^"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'full'"):
        pattern.parse("kda ful", {"kda", "full"})


def test_fill() -> None:
    assert pattern.fill(("a", "b"), 0) == ("a", "b")
    assert pattern.fill(("a", "b"), 5) == ("a", "b", "a", "b", "a")
    assert pattern.fill(("a", "b", "c"), 2) == ("a", "b")
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        pattern.fill(("a",), -1)


@pytest.mark.parametrize(
    ("r", "layers", "placement", "full"),
    [
        (3, 24, "last", [3, 7, 11, 15, 19, 23]),
        (3, 30, "last", [3, 7, 11, 15, 19, 23, 27]),  # the cut period has no full layer
        (3, 24, "first", [0, 4, 8, 12, 16, 20]),
        (6, 24, "middle", [3, 10, 17]),
        (24, 24, "middle", [12]),
        (1, 5, "last", [1, 3]),
        (2, 24, "last", [2, 5, 8, 11, 14, 17, 20, 23]),  # "one in three"
        (99, 24, [1, 12], [1, 12]),
    ],
)
def test_ratio(r: int, layers: int, placement: str | list[int], full: list[int]) -> None:
    names = pattern.parse(pattern.ratio("kda", "full", r, layers, placement))
    assert len(names) == layers
    assert [i for i, name in enumerate(names) if name == "full"] == full


@pytest.mark.parametrize(
    ("r", "layers", "placement", "message"),
    [
        (24, 24, "last", "needs at least 25 layers, not 24"),
        (0, 24, "last", "at least 1 linear layer"),
        (3, 0, "last", "num_layers"),
        (3, 24, "end", "last, first, middle"),
        (3, 24, [24], "0 to 23"),
    ],
)
def test_ratio_refuses(r: int, layers: int, placement: str | list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pattern.ratio("kda", "full", r, layers, placement)


def test_what_steers_a_terminal_is_spelt_out() -> None:
    with pytest.raises(pattern.PatternError) as caught:
        pattern.parse("kda\x1b[2J nobody")
    _, shown, mark = str(caught.value).split("\n")
    assert shown == r"  kda\x1b[2J nobody" and mark.index("^") == shown.index("\\")
