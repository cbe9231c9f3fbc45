"""The phonebook of `hybridlm.data.phonebook` as a prompt, for models of text (arXiv 2402.01032)."""

import random

from eval.tasks.base import PromptTask, Sample, Writer, largest
from hybridlm.data import phonebook


def write(writer: Writer) -> Sample:
    """As many entries as fit, at least four."""
    seed = writer.rng.getrandbits(64)
    book = lambda entries: phonebook.write(random.Random(seed), entries)
    size = largest(lambda entries: book(entries)[0], writer.count, writer.budget, 4)
    text, number = book(size)
    return Sample(text, (number,))


TASKS = [
    PromptTask(
        "phonebook", "Jelassi et al. 2024, arXiv 2402.01032", "the number of one of many names", write,
        max_new_tokens=16, guess=0.25 * 10.0 ** (1 - phonebook.DIGITS), stop=("\n",),
    )
]  # fmt: skip
