"""Passkey retrieval: a number in a sea of repeated text (Mohtashami & Jaggi 2023, arXiv 2305.16300, 4.2)."""

import re
from collections.abc import Sequence

from eval.tasks.base import PromptTask, Sample, Writer, largest

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def write(writer: Writer) -> Sample:
    """The sentence with the key stands anywhere among as many copies of the filler as fit."""
    key = writer.rng.randint(1, 50_000)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    depth = writer.rng.random()

    def text(copies: int) -> str:
        before = round(depth * copies)
        parts = [INTRODUCTION, *[FILLER] * before, needle, *[FILLER] * (copies - before), QUESTION]
        return "\n".join(parts)

    return Sample(text(largest(text, writer.count, writer.budget, 1)), (str(key),))


def first_number(completion: str, answers: Sequence[str]) -> float:
    """1 if the first number in the completion is the answer."""
    found = re.search(r"\d+", completion)
    return float(found is not None and found.group() == answers[0])


TASKS = [
    PromptTask(
        "passkey", "Mohtashami & Jaggi 2023, arXiv 2305.16300", "a number of 1 to 5 digits in filler", write,
        max_new_tokens=16, guess=1 / 50_000, score=first_number, stop=("\n",),
    )
]  # fmt: skip
