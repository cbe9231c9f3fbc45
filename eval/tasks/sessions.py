"""Several questions about one context: what a memory of fixed size still knows at the fifth.

SCBench (Li et al. 2024, arXiv 2412.10319) has two modes. *Turns*: the context is read, a question asked, the
right answer put in the model's place, the next asked. *Requests*: every question is asked of a copy of the
cache as it was after the context alone. Here the context is read once in both (`Subject.answer`), and a turn
is a branch in which the earlier questions and right answers are replayed, so the first turn is the first
request. Contexts: its key-value retrieval, whose prompt is InfiniteBench's, with values of up to 64 tokens
where SCBench allows 150; and RULER's needles, word to number in repeated text, for small models.

Context and questions are tokenized apart. A sample is a session: its turns share a context, so they are no
independent samples, and its score is their mean. Results have the accuracy of each turn besides.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from eval.subject import Progress, Subject
from eval.tasks import ruler
from eval.tasks.base import PROMPTS, Setting, Writer, any_contained, largest, several
from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer

TURNS = 5
SCBENCH = "SCBench, arXiv 2412.10319"


class Turn(NamedTuple):
    """rest: what stands behind the right answer before the next question."""

    question: str
    answer: str
    rest: str


class Session(NamedTuple):
    """context: text that is read once."""

    context: str
    turns: tuple[Turn, ...]


Draw = Callable[[random.Random], list[Turn]]
Write = Callable[[Writer, list[Turn]], Session]


@dataclasses.dataclass(frozen=True)
class SessionTask:
    """write: makes a session whose context has at most ``budget`` tokens.
    replay: whether a question stands behind the earlier ones and their answers.
    """

    name: str
    source: str
    about: str
    write: Write
    draw: Draw
    max_new_tokens: int
    guess: float
    replay: bool
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    text: bool = True

    def chance(self, config: Config) -> float | None:
        return self.guess

    def examples(self, subject: Subject, setting: Setting) -> str:
        return PROMPTS

    def sessions(self, tokens: Tokenizer, setting: Setting) -> list[Session]:
        """The same for both modes of a kind: a function of (seed, kind, length, index)."""
        count = lambda text: 1 + tokens.count(text)
        kind = self.name.partition("_")[0]

        def one(index: int) -> Session:
            rng = random.Random(f"{setting.seed} {kind} {setting.length} {index}")
            turns = self.draw(rng)
            taken = sum(tokens.count(part) for turn in turns for part in turn)
            budget = setting.length - self.max_new_tokens - taken
            return self.write(Writer(rng, count, budget, setting.length, setting.haystack), turns)

        return several(one, range(setting.samples))

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> np.ndarray:
        """[sessions, turns]."""
        tokens = subject.text_tokenizer
        contexts, questions, answers = [], [], []
        for session in self.sessions(tokens, setting):
            context = subject.encode(session.context)
            before: list[int] = []
            for question, answer, rest in session.turns:
                asked = tokens.encode(question)
                contexts.append(context)
                questions.append([*before, *asked])
                answers.append(answer)
                before += [*asked, *tokens.encode(answer + rest)] if self.replay else []
        ended = [0, 0]

        def turns(done: int) -> None:  # of which TURNS are a sample
            ended[0] += done
            progress(ended[0] // TURNS - ended[1])
            ended[1] = ended[0] // TURNS

        written = subject.answer(
            contexts, questions, max_new_tokens=self.max_new_tokens, stop=("\n",), progress=turns
        )
        scores = [
            any_contained(text, [answer.strip()]) for text, answer in zip(written, answers, strict=True)
        ]
        return np.array(scores).reshape(-1, TURNS)


def draw_keys(rng: random.Random) -> list[Turn]:
    uuid = ruler.DRAW["uuids"]
    ask = '\nKey: "{}"\nThe value associated with the specified key is: "'
    return [Turn(ask.format(uuid(rng)), uuid(rng), '"\n') for _ in range(TURNS)]


def write_keys(writer: Writer, turns: list[Turn]) -> Session:
    """The pairs that are asked for stand anywhere among as many others as fit."""
    asked = [f'"{question.split(chr(34))[1]}": "{answer}"' for question, answer, _ in turns]
    uuid, seed = ruler.DRAW["uuids"], writer.rng.getrandbits(64)

    def text(others: int) -> str:
        rng = random.Random(seed)
        pairs = [f'"{uuid(rng)}": "{uuid(rng)}"' for _ in range(others)]
        for pair in asked:
            pairs.insert(rng.randint(0, len(pairs)), pair)
        before = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        return f"{before}{{{', '.join(pairs)}}}\n"

    return Session(text(largest(text, writer.count, writer.budget, 1)), tuple(turns))


def draw_needles(rng: random.Random) -> list[Turn]:
    ask = (
        "\nWhat is the special magic number for {key} mentioned in the provided text?"
        " The special magic number for {key} mentioned in the provided text is"
    )
    keys: list[str] = []
    while len(keys) < TURNS:
        key = ruler.keyword(rng)
        keys += [key] if key not in keys else []
    return [Turn(ask.format(key=key), f" {ruler.DRAW['numbers'](rng)}", ".\n") for key in keys]


def write_needles(writer: Writer, turns: list[Turn]) -> Session:
    key = lambda question: question.split(" for ", 1)[1].split(" mentioned")[0]
    hidden = [
        ruler.NEEDLE.format(kind="numbers", key=key(question), value=answer.strip())
        for question, answer, _ in turns
    ]
    seed = writer.rng.getrandbits(64)
    before = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the numbers afterwards.\n"
    )

    def text(size: int) -> str:
        rng, lines = random.Random(seed), [ruler.NOISE] * size
        for needle in hidden:
            lines.insert(rng.randint(0, len(lines)), needle)
        return before + "\n".join(lines) + "\n"

    return Session(text(largest(text, writer.count, writer.budget, 1)), tuple(turns))


def _both(
    kind: str, source: str, about: str, write: Write, draw: Draw, new: int, guess: float
) -> list[SessionTask]:  # fmt: skip
    modes = (("turns", "in turn, right answers kept", True), ("requests", "each of a fresh copy", False))
    return [
        SessionTask(f"{kind}_{mode}", source, f"{about}, {how}", write, draw, new, guess, replay)
        for mode, how, replay in modes
    ]


TASKS: list[SessionTask] = [
    *_both("kv", SCBENCH, "5 uuids of a JSON object", write_keys, draw_keys, 64, 2.0**-122),
    *_both(
        "needles", f"{SCBENCH}; RULER's needles", "5 numbers in repeated text",
        write_needles, draw_needles, 16, 1 / 9_000_000,
    ),
]  # fmt: skip
