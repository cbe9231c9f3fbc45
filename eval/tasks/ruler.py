"""RULER: retrieval, tracing and aggregation over generated text (Hsieh et al. 2024, arXiv 2404.06654).

Prompts, needles and settings are those of the published generator (NVIDIA/RULER, scripts/data/synthetic, with
the template for base models: the question, then the beginning of its answer), its misspelt word included.
What differs: the "essay" haystack is any text (`eval.haystack`; --haystack=essays: is theirs), its sentences
are cut by punctuation, sizes fit each sample rather than the first, needles are shuffled anew for each
sample, and common_words knows the words of wonderwords and no more. QA is in `ruler_qa`.
"""

import functools
import itertools
import random
import string
import uuid
from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

import numpy as np
from scipy.special import zeta

from eval.haystack import sentences
from eval.tasks.base import PromptTask, Sample, TooShort, Writer, largest
from hybridlm.errors import ConfigError

SOURCE = "RULER, Hsieh et al. 2024, arXiv 2404.06654"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(depth) for depth in np.linspace(0, 100, 40)]


@functools.cache
def words(*lists: str) -> tuple[str, ...]:
    """Distinct words of wonderwords' lists (noun, adjective, verb), sorted."""
    try:
        assets = resources.files("wonderwords") / "assets"
    except ModuleNotFoundError as error:
        fix = "pip install 'hybridlm[eval]'."
        raise ConfigError("--tasks", "RULER", "needs the word lists of wonderwords", fix) from error
    found = {word for name in lists for word in (assets / f"{name}list.txt").read_text().split("\n")}
    return tuple(sorted(word.strip() for word in found if word.strip()))


def keyword(rng: random.Random) -> str:
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


DRAW: dict[str, Callable[[random.Random], str]] = {
    "words": keyword,
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


class Needles(NamedTuple):
    """Settings of a needle-in-a-haystack task: what it hides in, kinds of key and value, and how many."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


def write_needles(needles: Needles, writer: Writer) -> Sample:
    rng, kind = writer.rng, needles.value
    keys = [DRAW[needles.key](rng) for _ in range(max(needles.keys, needles.queries))]
    values = [[DRAW[kind](rng) for _ in range(needles.values)] for _ in keys]
    hidden = [
        NEEDLE.format(kind=kind, key=k, value=v) for k, vs in zip(keys, values, strict=True) for v in vs
    ]
    rng.shuffle(hidden)
    asked = rng.sample(range(len(keys)), needles.queries)
    queries = [keys[i] for i in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    single = needles.queries * needles.values == 1
    what, are, every, some = (kind[:-1], "is", "is", "A") if single else (kind, "are", "are all", "Some")
    before = (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n"
    )
    after = (
        f"\nWhat {every} the special magic {what} for {query} mentioned in the provided text?"
        f" The special magic {what} for {query} mentioned in the provided text {are}"
    )
    seed = rng.getrandbits(64)

    def text(size: int) -> str:
        placing = random.Random(seed)
        if needles.haystack == "text":
            context = _among_sentences(hidden, sentences(writer.haystack.text(size)), placing)
        else:
            draw = lambda: NEEDLE.format(kind=kind, key=DRAW[needles.key](placing), value=DRAW[kind](placing))
            lines = [NOISE if needles.haystack == "repeat" else draw() for _ in range(size)]
            for place, needle in zip(
                sorted(placing.sample(range(size), len(hidden)), reverse=True), hidden, strict=True
            ):
                lines.insert(place, needle)
            context = "\n".join(lines)
        return before + context + after

    size = largest(text, writer.count, writer.budget, max(5, len(hidden)))
    return Sample(text(size), tuple(value for i in asked for value in values[i]))


def _among_sentences(hidden: list[str], lines: list[str], rng: random.Random) -> str:
    """``hidden`` at different ones of 40 depths, 0 to 100% of the sentences."""
    places = sorted(len(lines) * depth // 100 for depth in rng.sample(DEPTHS, len(hidden)))
    parts, last = [], 0
    for place, needle in zip(places, hidden, strict=True):
        parts += [" ".join(lines[last:place]), needle]
        last = place
    return " ".join([*parts, " ".join(lines[last:])])


def write_variable_tracking(writer: Writer, hops: int = 4) -> Sample:
    """One chain of assignments among filler, after a solved example of 500 tokens with names of 3 letters."""
    rng = writer.rng

    def chain(letters: int, value: str) -> list[str]:
        names: list[str] = []
        while len(names) < hops + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)]
        return [*lines, *names]

    def problem(parts: list[str], value: str, copies: int, placing: random.Random) -> str:
        lines = [f"{NOISE}\n"] * copies
        for offset, place in enumerate(sorted(placing.sample(range(copies), hops + 1))):
            lines.insert(place + offset, parts[offset])
        context = " ".join(lines)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assgined the value {value}, they are: "
        )

    draw_value = lambda: str(rng.randint(10_000, 99_998))
    value, example_value = draw_value(), draw_value()
    parts, example_parts = chain(5, value), chain(3, example_value)
    example_seed = rng.getrandbits(64)
    example = lambda copies: problem(example_parts, example_value, copies, random.Random(example_seed))
    try:
        copies = largest(example, writer.count, 500, hops + 1)
    except TooShort:  # a tokenizer of many tokens a word
        copies = hops + 1
    shot = f" {example(copies)} {' '.join(example_parts[hops + 1 :])}\n\n\n\n"
    seed = rng.getrandbits(64)
    text = lambda copies: shot + problem(parts, value, copies, random.Random(seed))
    size = largest(text, writer.count, writer.budget, hops + 1)
    return Sample(text(size), tuple(parts[hops + 1 :]))


def write_common_words(writer: Writer) -> Sample:
    """Ten words come 30 times, the others 3 times (below 4096 tokens 6 and 1), after one solved example."""
    rng = writer.rng
    short = writer.length < 4096
    every = words("noun", "adjective", "verb")

    def problem(drawn: list[str], common: int, uncommon: int, order: random.Random) -> str:
        listed = drawn[:10] * common + drawn[10:] * uncommon
        order.shuffle(listed)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{numbered}\n"
            "Question: What are the 10 most common words in the above list?"
            " Answer: The top 10 words that appear most often in the list are:"
        )

    example = rng.sample(every, 20 if short else 40)
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(example[:10], 1))
    shot = problem(example, *((3, 1) if short else (10, 3)), random.Random(rng.getrandbits(64)))
    drawn, seed = rng.sample(every, len(every)), rng.getrandbits(64)
    counts = (6, 1) if short else (30, 3)
    text = lambda size: f"{shot}{solved}\n" + problem(drawn[:size], *counts, random.Random(seed))
    size = largest(text, writer.count, writer.budget, 11, most=len(every))
    return Sample(text(size), tuple(drawn[:10]))


def write_frequent_words(writer: Writer, alpha: float = 2.0) -> Sample:
    """Coded words of six letters, frequencies by a zeta law; the top rank is "...", the next three wanted."""
    rng = writer.rng
    coded: list[str] = []
    while len(coded) < max(5, writer.length // 50):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        coded += [word] if word not in coded else []
    coded[0] = "..."
    shares = np.arange(1, len(coded) + 1) ** -alpha / zeta(alpha)
    seed = rng.getrandbits(64)

    def text(size: int) -> str:
        counts = (size * shares).astype(int)
        listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(listed)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(listed)}\n"
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
            " Answer: According to the coded text above, the three most frequently appeared words are:"
        )

    return Sample(text(largest(text, writer.count, writer.budget, 50)), tuple(coded[1:4]))


def _needle_task(name: str, about: str, needles: Needles) -> PromptTask:
    guess = {"numbers": 1 / 9_000_000, "uuids": 2.0**-122}[needles.value]
    write = functools.partial(write_needles, needles)
    return PromptTask(name, SOURCE, about, write, max_new_tokens=128, guess=guess)


TASKS = [
    _needle_task("niah_single_1", "word -> number in repeated text", Needles("repeat")),
    _needle_task("niah_single_2", "word -> number in prose", Needles("text")),
    _needle_task("niah_single_3", "word -> uuid in prose", Needles("text", value="uuids")),
    _needle_task("niah_multikey_1", "the same, one of four needles", Needles("text", keys=4)),
    _needle_task("niah_multikey_2", "word -> number among needles alone", Needles("needles")),
    _needle_task("niah_multikey_3", "uuid -> uuid among needles alone", Needles("needles", "uuids", "uuids")),
    _needle_task("niah_multivalue", "four numbers of one word in prose", Needles("text", values=4)),
    _needle_task("niah_multiquery", "numbers of four words in prose", Needles("text", queries=4)),
    PromptTask(
        "variable_tracking", SOURCE, "all five names that one value reaches through assignments",
        write_variable_tracking, max_new_tokens=30, guess=26.0**-5,
    ),
    PromptTask(
        "common_words", SOURCE, "the ten words that a long list repeats most",
        write_common_words, max_new_tokens=120, guess=10 / 8000,
    ),
    PromptTask(
        "frequent_words", SOURCE, "the three most frequent coded words, frequencies being Zipf's",
        write_frequent_words, max_new_tokens=50, guess=3 * 26.0**-6,
    ),
]  # fmt: skip
