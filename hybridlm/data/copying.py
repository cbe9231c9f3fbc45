"""Data kind "copying": say again what was said: palindrome, copy, induction head.

palindrome  x_1 .. x_n <sep> x_n .. x_1, the reversed half is predicted (Kimi Linear, arXiv 2510.26692, 5.1)
copy        x_1 .. x_n <sep> x_1 .. x_n, likewise (Jelassi et al. 2024, "Repeat after me", arXiv 2402.01032)
induction   random tokens with <sep> once among them and once at the end; predicted is the one token that
            followed the first <sep> (Fu et al. 2022, "H3", arXiv 2212.14052, 3.1)

Elements are uniform over [0, V - 1) and <sep> is V - 1. An example fills a row: n is half of train.seq_len,
and the answer's last element, which predicts nothing, is left out. Kimi Linear does not state V.
"""

import dataclasses

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, no_targets
from hybridlm.data.source import View
from hybridlm.errors import ConfigError, one_of

TASKS = ("palindrome", "copy", "induction")


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """task: palindrome, copy or induction."""

    task: str = "palindrome"

    def check(self) -> None:
        one_of("task", self.task, TASKS)

    def open(self, view: View) -> Generated:
        length, separator = view.seq_len // 2 * 2, view.vocab_size - 1
        if length < 4 or separator < 2:
            raise ConfigError("task", self.task, "needs train.seq_len >= 4 and model.vocab_size >= 3")

        def induction(rng: np.random.Generator) -> Examples:
            tokens = rng.integers(separator, size=(BLOCK, length), dtype=np.int32)
            example, place = np.arange(BLOCK), rng.integers(length - 2, size=BLOCK)
            tokens[example, place] = tokens[:, -1] = separator
            targets = no_targets(tokens)
            targets[:, -1] = tokens[example, place + 1]
            return tokens, targets

        def again(rng: np.random.Generator) -> Examples:
            half = rng.integers(separator, size=(BLOCK, length // 2), dtype=np.int32)
            answer = half[:, ::-1] if self.task == "palindrome" else half
            tokens = np.concatenate([half, np.full((BLOCK, 1), separator, np.int32), answer[:, :-1]], axis=1)
            targets = no_targets(tokens)
            targets[:, length // 2 :] = answer
            return tokens, targets

        make, entropy = induction if self.task == "induction" else again, (1, TASKS.index(self.task), length)
        return Generated(make, view, self, name=self.task, length=length, entropy=entropy)
