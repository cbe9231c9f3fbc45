"""The recall suite of Based and Just Read Twice: facts to be found in real documents.

Data: the sets that the authors published (hazyresearch/based-*), read through Hugging Face `datasets`, or
local files <task>.jsonl with the same fields. Prompts, the window and the metric are those of their harness
(HazyResearch/prefix-linear-attention; Arora et al. 2024, arXiv 2402.18668, 2407.05483), which the tables of
Gated DeltaNet and MoM use too; lm-evaluation-harness's swde, fda and squad_completion differ. Zero-shot,
greedy, up to 48 tokens or a newline; an answer counts if it occurs in the completion, whatever its case.

The window: a document is cut to the tokens around its answer, so scores depend on the tokenizer.
"""

import contextlib
import dataclasses
import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval.subject import Progress, Subject
from eval.tasks.base import Setting, TooShort, any_contained
from hybridlm import untrusted
from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, RunError

Doc = dict[str, Any]
MAX_NEW_TOKENS = 48
ANSWERS = {"answers": [str]}


@dataclasses.dataclass(frozen=True)
class NaturalTask:
    """dataset: on the Hugging Face hub, split "validation".
    document: field that holds the document.  centre: fields whose first occurrence the window is laid around;
        none keeps the document's beginning.
    question: (fields, document after cutting) -> prompt.
    """

    name: str
    dataset: str
    about: str
    document: str
    centre: tuple[str, ...]
    question: Callable[[Doc, str], str]
    lengths: tuple[int, ...] = (2048,)
    source: str = "Based and JRT, arXiv 2402.18668, 2407.05483"
    text: bool = True

    @property
    def asked(self) -> str:
        """The field that the question is made of, "" for none."""
        return "key" if self.question is _key_value else "question" if self.question is _asked else ""

    def chance(self, config: Config) -> float | None:
        return None

    def examples(self, subject: Subject, setting: Setting) -> str | None:
        """A hash of the local file; None of what is downloaded, or cannot be read, which `run` says."""
        if setting.data_dir:
            with contextlib.suppress(ConfigError):
                content = untrusted.read_bytes(self.local(setting.data_dir), "--data_dir")
                return hashlib.sha256(content).hexdigest()
        return None

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> np.ndarray:
        room = setting.length - MAX_NEW_TOKENS
        if room < 1:
            raise TooShort(f"a token of a document is needed, beside {MAX_NEW_TOKENS} of the answer")
        docs = [doc for doc in self.docs(setting.data_dir) if self.usable(doc)]
        random.Random(f"{setting.seed} {self.name}").shuffle(docs)
        docs = docs[: setting.samples]
        prompts = [subject.encode(self.prompt(doc, subject.text_tokenizer, room)) for doc in docs]
        completions = subject.complete(
            prompts, max_new_tokens=MAX_NEW_TOKENS, stop=("\n",), progress=progress
        )
        return np.array([any_contained(c, answers(d)) for c, d in zip(completions, docs, strict=True)])

    def prompt(self, doc: Doc, tokens: Tokenizer, room: int) -> str:
        wanted = [first(doc[field]) for field in self.centre]
        return self.question(doc, window(document(doc, self.document), wanted, tokens, room))

    def usable(self, doc: Doc) -> bool:
        """The harness leaves out documents with a centre of one character."""
        return bool(answers(doc)) and all(len(first(doc[field])) > 1 for field in self.centre)

    def local(self, data_dir: str) -> Path:
        return Path(data_dir).expanduser() / f"{self.name}.jsonl"

    def docs(self, data_dir: str) -> list[Doc]:
        if data_dir:
            return read(self.local(data_dir), self)
        try:
            import datasets
        except ImportError as error:
            fix = "pip install 'hybridlm[eval]', or give --data_dir with local files."
            raise ConfigError("--tasks", self.name, "needs the package datasets", fix) from error
        try:
            return list(datasets.load_dataset(self.dataset, split="validation"))
        except Exception as error:  # the network, the hub, the cache: whatever it was, the text says
            hint = f"Without network, put {self.name}.jsonl into a folder and give --data_dir."
            raise RunError(f"{self.dataset} could not be loaded: {error}. {hint}") from error


def read(path: Path, task: "NaturalTask") -> list[Doc]:
    """The objects of a JSON Lines file, which must have the fields that ``task`` reads, as texts or lists."""
    lines = untrusted.read_bytes(path, "--data_dir").splitlines()
    docs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            doc = untrusted.parse(line)
            untrusted.check_shape(doc, {task.document: str} | {f: (str, [str]) for f in task.centre})
            untrusted.check_shape(doc, ANSWERS if "value" not in doc else {"value": str})
            untrusted.check_shape(doc, {task.asked: str} if task.asked else dict)
            if task.asked and not doc[task.asked].strip():
                raise ValueError(f"{task.asked} is empty")
        except ValueError as error:
            raise ConfigError("--data_dir", f"{path}:{number}", f"cannot be used: {error}") from error
        docs.append(doc)
    return docs


def window(text: str, wanted: list[str], tokens: Tokenizer, room: int) -> str:
    """``room`` tokens of ``text`` around the earliest of ``wanted``: half before, the rest from it on.

    None wanted: the beginning. Not found: counted from the end, as in the harness.
    """
    text = text.strip()
    places = [found.start() for want in wanted if (found := re.search(re.escape(want), text, re.IGNORECASE))]
    place = min(places, default=-1) if wanted else 0
    whole, at = tokens.encode(text), len(tokens.encode(text[:place]))
    start = max(0, at - room // 2)
    return tokens.decode(whole[start : min(len(whole), start + room)])


def document(doc: Doc, field: str) -> str:
    """The text, without the request for a summary that SWDE's ends with."""
    return doc[field].split("Summary of information above...")[0]


def first(value: str | list[str]) -> str:
    return value if isinstance(value, str) else next(iter(value), "")


def answers(doc: Doc) -> list[str]:
    return [doc["value"]] if "value" in doc else list(doc["answers"])


def _key_value(doc: Doc, text: str) -> str:
    """SWDE and FDA: the document, then "Key:" for the model to go on from."""
    question = doc["key"] + ":"
    while text.lower().endswith(question.lower()):
        text = text[: -len(question)]
    return f"{text.strip().strip('.')}. {question[0].upper()}{question[1:]}"


def _completion(doc: Doc, text: str) -> str:
    return text.strip()


def _asked(doc: Doc, text: str) -> str:
    question = doc["question"].strip()
    text = re.sub(r"\[PAR\]|\[DOC\]|\[TLE\]", "", text).strip()
    while text.lower().endswith(question.lower()):
        text = text[: -len(question)].strip()
    return f"{text.strip('.')}. {question}"


_HUB = "hazyresearch/based"
TASKS = [
    NaturalTask("swde", f"{_HUB}-swde-v2", "a field of a web page", "text", ("key", "value"), _key_value),
    NaturalTask("fda", f"{_HUB}-fda", "a field of a device report", "text", ("key", "value"), _key_value),
    NaturalTask(
        "squad", f"{_HUB}-squad", "the end of a sentence about a passage", "text", ("value",), _completion
    ),
    NaturalTask("nq", f"{_HUB}_nq_2048", "a question about a page", "context", ("answers",), _asked),
    NaturalTask("triviaqa", f"{_HUB}_triviaqa", "a question about a document", "context", (), _asked),
    NaturalTask("drop", f"{_HUB}_drop", "a question about a passage", "context", (), _asked),
]
