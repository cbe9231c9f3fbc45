"""Patterns: what the grammar spells is read as it was meant; anything else is refused where it goes wrong."""

import random
from collections.abc import Callable
from pathlib import Path

from hybridlm import pattern, plan
from hybridlm.errors import ConfigError
from tests.fuzz.changes import in_bytes

KNOWN, MLPS = ("kda", "full", "_x", "B2"), ("moe", "none")
LABELS = ("", "", "", ":a", "@a", ":b", "@b")
PIECES = ("(", ")", "*", "/", ":", "@", " ", "0", "1", "3", "*0", "*2", "**", "kda", "full", "nobody", "moe",
          "é", "１２", "\n", "\0", "*" + "9" * 5000, "(" * 200, "full:a", "full@a", "*4096", "-")  # fmt: skip


def layer(chance: random.Random) -> str:
    return chance.choice(KNOWN) + chance.choice(LABELS) + chance.choice(("", "", "/moe", "/none"))


def spelt(chance: random.Random, depth: int = 0) -> tuple[str, list[str]]:
    """(a pattern, the layers that it means)."""
    space = lambda least="": least + chance.choice(("", "", " ", "\t \n"))
    text, layers = space(), []
    for _ in range(chance.randint(1, 3)):
        if depth < 3 and chance.random() < 0.4:
            inner, meant = spelt(chance, depth + 1)
            text += f"{space()}({inner}){space()}"
        else:
            name = layer(chance)
            text, meant = text + space(" ") + name, [name]
        if chance.random() < 0.4:
            count = chance.choice((1, 2, 3, 7))
            text, meant = f"{text}{space()}*{space()}{chance.choice(('', '00'))}{count}", meant * count
        layers += meant
    return text + space(), layers


def check(text: str, layers: tuple[str, ...]) -> None:
    again = pattern.parse(str(plan.plan(layers)), KNOWN, MLPS)
    assert again == layers, f"{text!r}: the plan reads back as {again}"
    try:
        sources = pattern.sources(layers)
    except ConfigError:
        return
    for to, of in sources.items():
        label = pattern.labels(layers[to])[1]
        assert of < to and pattern.labels(layers[of])[0] == label, text
        assert all(pattern.labels(one)[0] != label for one in layers[of + 1 : to]), text


def cases(folder: Path) -> Callable[[random.Random], str]:
    def case(chance: random.Random) -> str:
        if chance.random() < 0.3:
            text, layers = spelt(chance)
            found = pattern.parse(text, KNOWN, MLPS)
            assert list(found) == layers, f"{text!r}: {found}, meant {layers}"
            check(text, found[:64])
            depth = chance.choice((0, 1, 5, 100))
            filled = pattern.fill(found, depth)
            assert list(filled) == [layers[i % len(layers)] for i in range(depth or len(layers))]
            return "read"
        if chance.random() < 0.2:
            return ratio(chance)
        if chance.random() < 0.5:
            text = "".join(chance.choices(PIECES, k=chance.randint(1, 12)))
        else:
            text = in_bytes(spelt(chance)[0].encode(), chance).decode("utf-8", "surrogateescape")
        try:
            check(text, pattern.parse(text, KNOWN, MLPS)[:64])
        except pattern.PatternError as error:
            assert 0 <= error.position <= len(text), f"{text!r}: at {error.position}"
            raise
        return "odd, read"

    return case


def ratio(chance: random.Random) -> str:
    r, depth = chance.choice((-1, 0, 1, 3, 7, 4096)), chance.choice((-1, 0, 1, 4, 25, 300))
    indices = [chance.randint(-1, 30) for _ in range(chance.randint(0, 3))]
    where = chance.choice(("last", "first", "middle", "", "nowhere", indices))
    layers = pattern.parse(pattern.ratio("kda", "full", r, depth, where))
    full = [i for i, name in enumerate(layers) if name == "full"]
    assert len(layers) == depth
    assert full == sorted(set(indices)) if where is indices else len(full) >= depth // (r + 1)
    return "ratio"
