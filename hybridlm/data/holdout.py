"""Which documents are held out: a rule that two machines and two releases share, and never leaves none.

A document is held out if the hash of its key (where it lies, see `files`) falls below the fraction, so what
is held out does not depend on the other documents. Where that would leave one split empty, the document that
is nearest to the other side changes sides; a single document is cut, and its end is held out.
"""

import hashlib
from collections.abc import Sequence


def rank(key: str) -> int:
    """A number of 64 bits that ``key`` alone decides."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def held_out(key: str, fraction: float) -> bool:
    """Whether the document called ``key`` belongs to the held-out ``fraction``: its hash alone decides."""
    return rank(key) < fraction * 2.0**64


def choose(keys: Sequence[str], fraction: float) -> list[bool]:
    """For each of two or more documents whether it is held out: at least one is and one is not.

    A fraction of 0 holds out none.
    """
    held = [held_out(key, fraction) for key in keys]
    if fraction and not any(held):
        held[min(range(len(keys)), key=lambda i: (rank(keys[i]), i))] = True
    elif all(held) and len(keys) > 1:
        held[max(range(len(keys)), key=lambda i: (rank(keys[i]), i))] = False
    return held


def cut(text: bytes, fraction: float) -> int:
    """Where the held-out end of a single document begins: bytes from the start.

    After the first line break from there on, if that lies within the end's first half; else at a character's
    first byte. 0 or len(text) for a text of one character or none.
    """
    if not text:
        return 0
    at = len(text) - max(1, round(len(text) * fraction))
    line = text.find(b"\n", max(at - 1, 0), at + (len(text) - at) // 2) + 1
    if line:
        return line
    while at < len(text) and text[at] & 0xC0 == 0x80:  # UTF-8 inside of a character
        at += 1
    return at
