"""Changes to bytes and to JSON values."""

import contextlib
import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 1 << 40, 1 << 70, 4_000_000_000, 0.5, -0.0, 1e300, float("inf"),
    float("nan"), "", "x", "../x", "/etc/passwd", "\ud800", "\x1b[31m", [], [0], [None], ["x"], [[]], {},
    {"a": 1}, {"type": "x"}, {"layers": [0], "num_heads": 2},
)  # fmt: skip


def in_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to three changes: bits, runs, cuts, repetitions."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        span = chance.choice((1, 2, 8, 100))
        what = chance.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[at : at + span] = chance.randbytes(span)
        elif what == 2:
            del data[at:]
        elif what == 3:
            del data[at : at + span]
        elif what == 4:
            data[at:at] = data[at : at + span] * chance.choice((1, 50))
        else:
            data[at:at] = chance.choice((b"\0", b"[" * 2000, b'"', b"\n", b"\xff\xfe", b"{", b"9" * 5000))
    return bytes(data)


def in_file(content: bytes, chance: random.Random) -> bytes:
    """Of JSON mostly a value, of anything else, and of JSON that is damaged already, bytes."""
    if chance.random() < 0.7:
        with contextlib.suppress(ValueError):
            return json.dumps(in_json(json.loads(content), chance)).encode()
    return in_bytes(content or b"x", chance)


def in_json(value: Any, chance: random.Random) -> Any:
    """One place of a JSON value changed, removed or added to; deep nesting now and then."""
    value = copy.deepcopy(value)
    owner, key = value, None
    place = value
    while isinstance(place, dict | list) and place and (key is None or chance.random() < 0.8):
        owner = place
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        place = owner[key]
    if key is None:
        return chance.choice(VALUES)
    what = chance.randrange(5)
    if what == 0:
        del owner[key]
    elif what == 1 and isinstance(owner, dict):
        owner[chance.choice(("x", "id", "", "type"))] = owner.pop(key)
    elif what == 2 and isinstance(place, int) and not isinstance(place, bool):
        owner[key] = place + chance.choice((-1, 1, 1 << 33))
    elif what == 3:
        for _ in range(chance.choice((1, 3, 200))):
            owner[key] = [owner[key]]
    else:
        owner[key] = chance.choice(VALUES)
    return value
