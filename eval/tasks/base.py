"""What a task is, and the kind that prompts a model and reads what it writes."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from eval.haystack import Haystack
from eval.subject import Progress, Subject
from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer

T = TypeVar("T")
PROMPTS = "3"  # of what is written here and in the tasks: earlier releases wrote others


class Setting(NamedTuple):
    """One measurement of a task.

    length: context in tokens, generated ones included; 0 for tasks whose texts are as long as they are.
    samples: how many, at most.  seed: of the samples.
    haystack: text that needles are hidden in.
    data_dir: folder of local files <task>.jsonl in place of downloads; "" downloads.
    """

    length: int
    samples: int
    seed: int
    haystack: Haystack
    data_dir: str = ""


class Task(Protocol):
    """A measurement with a public definition.

    name: as on the command line.  source: where the definition is.  about: what is asked, in a line.
    lengths: context lengths that are measured if none are named.
    text: whether it needs a tokenizer.

    A task whose samples depend on more than the setting, the tokenizer and the task itself has a method
    ``examples(subject, setting)``, a text that tells what. One whose samples no seed changes has ``seeded``
    False, and is measured with seed 0.
    """

    name: str
    source: str
    about: str
    lengths: tuple[int, ...]
    text: bool

    def chance(self, config: Config) -> float | None:
        """Score of answers drawn at random from all that are possible, without reading; None if undefined.

        config: of the run that is measured.
        """

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> np.ndarray:
        """A score in [0, 1] for each sample; ``progress`` is called with the number of samples done."""


class Sample(NamedTuple):
    """prompt: text that the model continues.  answers: what its continuation is scored by."""

    prompt: str
    answers: tuple[str, ...]


class Writer(NamedTuple):
    """What a sample is written with.

    rng: of this sample alone.  count: text -> tokens.  budget: tokens that the prompt may have.
    length: the whole context, from which some tasks take their settings.  haystack: text to hide in.
    """

    rng: random.Random
    count: Callable[[str], int]
    budget: int
    length: int
    haystack: Haystack


Score = Callable[[str, Sequence[str]], float]


def share_contained(completion: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of answers that occur in the completion, whatever their case."""
    return sum(answer.lower() in completion.lower() for answer in answers) / len(answers)


def any_contained(completion: str, answers: Sequence[str]) -> float:
    """The Based suite's "contains": 1 if any answer occurs in the completion, whatever its case."""
    return float(any(answer.lower() in completion.lower() for answer in answers))


@dataclasses.dataclass(frozen=True)
class PromptTask:
    """A task of generated prompts, each a function of (seed, task, length, index).

    write: makes a sample whose prompt has at most ``budget`` tokens.
    max_new_tokens: of the answer; part of the context length.
    guess: the chance of one answer at random.
    """

    name: str
    source: str
    about: str
    write: Callable[[Writer], Sample]
    max_new_tokens: int
    guess: float
    score: Score = share_contained
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    stop: tuple[str, ...] = ()
    text: bool = True

    def chance(self, config: Config) -> float | None:
        return self.guess

    def examples(self, subject: Subject, setting: Setting) -> str:
        return PROMPTS

    def samples(self, tokens: Tokenizer, setting: Setting) -> list[Sample]:
        count = lambda text: 1 + tokens.count(text)  # and the document separator
        budget = setting.length - self.max_new_tokens

        def one(index: int) -> Sample:
            rng = random.Random(f"{setting.seed} {self.name} {setting.length} {index}")
            return self.write(Writer(rng, count, budget, setting.length, setting.haystack))

        return several(one, range(setting.samples))

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> np.ndarray:
        samples = self.samples(subject.text_tokenizer, setting)
        completions = subject.complete(
            several(lambda index: subject.encode(samples[index].prompt), range(len(samples))),
            max_new_tokens=self.max_new_tokens, stop=self.stop, progress=progress,
        )  # fmt: skip
        return np.array([self.score(c, s.answers) for c, s in zip(completions, samples, strict=True)])


def several(make: Callable[[int], T], indices: Iterable[int]) -> list[T]:
    """``make`` of each, in order, by threads: what takes time, counting tokens, runs beside others."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(make, indices))


class TooShort(ValueError):
    """The context is too short for even the smallest sample."""


def largest(
    write: Callable[[int], str], count: Callable[[str], int], budget: int, least: int, most: int = 1 << 40
) -> int:
    """The largest size from ``least`` to ``most`` whose text has at most ``budget`` tokens.

    Text is taken to grow with size; where what is random in it does not, a size that fits before one that
    does not. TooShort if the least does not fit. Counting tokens is what takes time: of texts near the budget
    it is done about three times.
    """
    spent = count(write(least))
    if spent > budget:
        raise TooShort(f"at least {spent} tokens are needed, beside the answer's")
    fits, beyond = (least, spent), (most + 1, 0)  # sizes and tokens; 0: none that is too long is known
    first, turn = fits, 0
    while beyond[0] - fits[0] > 1:  # along the line through the two, or through what fitted so far
        turn += 1
        left = budget - fits[1]
        if not beyond[1]:
            grown = fits[1] - first[1]
            size = fits[0] + (1 + left * (fits[0] - first[0]) // grown if grown > 0 else fits[0])
            size = min(size, 8 * fits[0])
        elif turn % 4:
            size = fits[0] + left * (beyond[0] - fits[0]) // (beyond[1] - fits[1])
        else:  # however text grows, the search ends soon
            size = (fits[0] + beyond[0]) // 2
        size = min(max(size, fits[0] + 1), beyond[0] - 1)
        spent = count(write(size))
        fits, beyond = ((size, spent), beyond) if spent <= budget else (fits, (size, spent))
    return fits[0]
