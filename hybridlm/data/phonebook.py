"""Data kind "phonebook": a list of names and numbers, two of its lines again, then a name.

Jelassi et al. 2024, "Repeat after me" (arXiv 2402.01032), in bytes: ``entries`` lines "First Last:
dddddddddd", an empty line, two of them as examples, an empty line, "First Last:" of a third. Targets are
the ten digits, each predicted from those before it. There names come from a list of real ones, not all
different; here they are made of syllables, four letters each, and no two of a book are equal. The first
digit is 6 to 9.
"""

import dataclasses
import random
from typing import Annotated

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, need, no_targets
from hybridlm.data.source import View
from hybridlm.fields import Limits

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
DIGITS = 10
LINE = len("Bano Rilu: 6123456789\n")


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """entries: of a book; published models train on up to 70 and are tested on as many."""

    entries: Annotated[int, Limits(3, 10_000)] = 16

    def open(self, view: View) -> Generated:
        size = length(self.entries)
        need(view, "kind", "phonebook", vocab_size=256)
        need(view, "entries", self.entries, seq_len=size)

        def make(rng: np.random.Generator) -> Examples:
            seeds = rng.integers(2**63, size=BLOCK).tolist()
            books = [" ".join(write(random.Random(seed), self.entries)).encode() for seed in seeds]
            whole = np.stack([np.frombuffer(book, np.uint8) for book in books]).astype(np.int32)
            tokens = whole[:, :-1]
            targets = no_targets(tokens)
            targets[:, -DIGITS:] = whole[:, -DIGITS:]
            return tokens, targets

        name, entropy = f"phonebook of {self.entries}", (9, self.entries)
        return Generated(make, view, self, name=name, length=size, entropy=entropy)


def length(entries: int) -> int:
    """Tokens (bytes) of an example; the last digit predicts nothing."""
    return (entries + 2) * LINE + 2 + len("Bano Rilu: ") + DIGITS - 1


def write(rng: random.Random, entries: int) -> tuple[str, str]:
    """(all up to the asked name's colon, its number)."""
    name = lambda: "".join(rng.choices(SYLLABLES, k=2)).capitalize()
    book: dict[str, str] = {}
    while len(book) < entries:
        book[f"{name()} {name()}"] = str(rng.randint(6 * 10 ** (DIGITS - 1), 10**DIGITS - 1))
    lines = [f"{who}: {number}\n" for who, number in book.items()]
    first, second, asked = rng.sample(range(entries), 3)
    who, number = list(book.items())[asked]
    return f"{''.join(lines)}\n{lines[first]}{lines[second]}\n{who}:", number
