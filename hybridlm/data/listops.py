"""Data kind "listops": the value of a nested expression over digits, one example a row, read at its end.

Nangia & Bowman 2018 (arXiv 1804.06028) as Long Range Arena (arXiv 2011.04006) generates it: an operator has
2 to 10 arguments, each an operator with probability 1/4 while the depth allows, else a digit; operators are
MIN, MAX, MED (the median, rounded down) and SM (the sum mod 10). Expressions are kept that have more tokens
than a quarter of a row and fewer than a row, LRA's 500 to 2000 at train.seq_len = 2000.

The classification reading: the class is the target at a mark behind the expression, which ends the row;
padding stands before it, as a causal model wants it. LRA pads behind, and its published rows of state space
models are bidirectional. Answers are skewed: always the same digit is right in `CONSTANT` of the examples.
"""

import dataclasses
import random
import statistics
from collections.abc import Callable

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, classified, need
from hybridlm.data.source import View
from hybridlm.errors import ConfigError
from hybridlm.fields import Positive

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min, "MAX": max, "MED": lambda x: int(statistics.median(x)), "SM": lambda x: sum(x) % 10,
}  # fmt: skip
DIGITS = 10
CLOSE, MARK, PAD = DIGITS + 4, DIGITS + 5, DIGITS + 6  # operators, with their bracket, are 10 .. 13
VOCABULARY = PAD + 1
ARGUMENTS, NESTED = (2, 10), 0.25
LEAST_ROW = 16
CONSTANT = 0.175


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """depth: of nested operators at most; 10 in LRA.
    train_examples: 96k in LRA; the held-out ones are 2k there.
    """

    depth: Positive = 10

    def open(self, view: View) -> Generated:
        depth, length = self.depth, view.seq_len
        need(view, "kind", "listops", vocab_size=VOCABULARY, seq_len=LEAST_ROW)
        if _mean_size(depth) < length / 8:  # nearly all would be too short
            allowed = f"is too small to fill a quarter of train.seq_len = {length}"
            raise ConfigError("depth", depth, allowed, "LRA has 10 for 2000 tokens.")

        def make(rng: np.random.Generator) -> Examples:
            draw = random.Random(int(rng.integers(2**63)))
            made: list[tuple[list[int], int]] = []
            while len(made) < BLOCK:
                tokens: list[int] = []
                value = _expression(draw, tokens, depth, length)
                if value is not None and length // 4 < len(tokens) < length:
                    made.append((tokens, value))
            return classified(made, length, mark=MARK, pad=PAD)

        name, entropy = f"listops of depth {depth}", (11, depth, length)
        return Generated(make, view, self, name=name, length=length, entropy=entropy)


def _expression(draw: random.Random, tokens: list[int], depth: int, most: int) -> int | None:
    """Appends an operator with its arguments; its value, None where it gets longer than ``most``."""
    operator = draw.randrange(len(OPERATORS))
    tokens.append(DIGITS + operator)
    values = []
    for _ in range(draw.randint(*ARGUMENTS)):
        if depth > 1 and draw.random() < NESTED:
            value = _expression(draw, tokens, depth - 1, most)
            if value is None:
                return None
        else:
            value = draw.randrange(DIGITS)
            tokens.append(value)
        values.append(value)
        if len(tokens) > most:
            return None
    tokens.append(CLOSE)
    return list(OPERATORS.values())[operator](values)


def _mean_size(depth: int) -> float:
    """Tokens of an expression, on average."""
    inner = _mean_size(depth - 1) if depth > 1 else 1.0
    return 2 + sum(ARGUMENTS) / 2 * (1 - NESTED + NESTED * inner)
