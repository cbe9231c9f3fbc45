"""Sessions solved by a program that reads the context only; turns and requests of the same samples."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from benchmarks import session_text
from eval import haystack, report, runner, tasks
from eval.tasks import base, sessions
from hybridlm.data import tokenizer

BYTES = tokenizer.load("bytes")
TASKS = {task.name: task for task in sessions.TASKS}


def setting(length=2048, samples=3, seed=0):
    return base.Setting(length, samples, seed, haystack.load())


def solve(context, question):
    if key := re.search(r'Key: "([^"]+)"', question):
        return re.search(rf'"{key[1]}": "([^"]+)"', context)[1]
    key = re.search(r"number for (.+?) mentioned", question)[1]
    return re.search(rf"numbers for {re.escape(key)} is: (\d+)\.", context)[1]


class Reader:
    """A subject that answers right the turns of a session before ``fails``."""

    tokenizer = text_tokenizer = BYTES
    step, checkpoint, config = 0, "", None  # tasks of text do not ask what the model is

    def __init__(self, fails=5):
        self.fails, self.questions = fails, []

    def kept_bytes(self, length):
        return 3 * length

    def encode(self, text):
        return [BYTES.doc_id, *BYTES.encode(text)]

    def answer(self, contexts, questions, *, max_new_tokens, stop, progress):
        texts = []
        for index, (context, question) in enumerate(zip(contexts, questions, strict=True)):
            assert len(context) + len(question) + max_new_tokens <= 2048
            asked = BYTES.decode(question)
            self.questions.append(asked)
            last = asked[asked.rindex("\nKey") if "\nKey" in asked else asked.rindex("\nWhat") :]
            texts.append(solve(BYTES.decode(context), last) if index % 5 < self.fails else "no idea")
            progress(1)
        return texts


@pytest.mark.parametrize("name", TASKS)
def test_sessions_can_be_solved_by_reading_them(name):
    done = []
    assert TASKS[name].run(Reader(), setting(), done.append).tolist() == [[1.0] * 5] * 3 and sum(done) == 3
    scores = TASKS[name].run(Reader(fails=2), setting(), lambda done: None)
    assert scores.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]] * 3
    for session in TASKS[name].sessions(BYTES, setting()):
        taken = sum(len(BYTES.encode(part)) for turn in session.turns for part in turn)
        assert (
            2048 * 0.9 < 1 + len(BYTES.encode(session.context)) + taken + TASKS[name].max_new_tokens <= 2048
        )


@pytest.mark.parametrize("kind", ["kv", "needles"])
def test_turns_keep_what_was_asked_and_requests_do_not(kind):
    turns, requests = Reader(), Reader()
    TASKS[f"{kind}_turns"].run(turns, setting(samples=1), lambda done: None)
    TASKS[f"{kind}_requests"].run(requests, setting(samples=1), lambda done: None)
    assert turns.questions[0] == requests.questions[0]
    session = TASKS[f"{kind}_turns"].sessions(BYTES, setting(samples=1))[0]
    assert requests.questions == [turn.question for turn in session.turns]
    whole = "".join(question + answer + rest for question, answer, rest in session.turns)
    assert all(whole.startswith(question) for question in turns.questions)
    assert len({answer for _, answer, _ in session.turns}) == 5


@pytest.mark.parametrize("name", TASKS)
def test_a_context_that_is_too_short_is_refused(name):
    with pytest.raises(base.TooShort, match="tokens are needed"):
        TASKS[name].sessions(BYTES, setting(600))


def test_turns_are_no_samples():
    """The interval is of sessions; each turn has its own accuracy."""
    plan = runner.Plan((2048,), setting(0, samples=3))
    result = runner.measure(Reader(fails=4), [TASKS["needles_turns"]], plan)["needles_turns@2048"]
    assert result["samples"] == 3 and result["scores"] == pytest.approx([0.8] * 3)
    assert result["by_turn"] == [1, 1, 1, 1, 0] and result["accuracy"] == pytest.approx(0.8)
    assert result["kept_bytes"] == 6144
    shown = io.StringIO()
    named = {"needles_turns@2048": result | {"task": "n" * 17, "length": 32_768, "samples": 1000}}
    Console(file=shown, width=80).print(report.table(named, ""))
    assert "6.14 kB" in shown.getvalue() and "…" not in shown.getvalue()
    assert report.turns(named) == ["needles_turns@2048 by turn: 1.00 1.00 1.00 1.00 0.00"]
    assert tasks.choose("sessions", []) == sessions.TASKS and np.isfinite(result["low"])


@pytest.mark.parametrize("kind", ["kv_turns", "needles_turns"])
def test_documents_that_teach_sessions_have_every_answer_in_their_context(kind):
    if kind.startswith("needles"):
        pytest.importorskip("wonderwords")
    texts = session_text.texts(1, [kind])
    asked = TASKS[kind].sessions(BYTES, setting(session_text.LENGTHS[1], session_text.EACH))
    assert not any(text.startswith(one.context) for text in texts for one in asked)
    assert len(set(texts)) == session_text.EACH
    for text in texts:
        context, *questions = re.split(r"\n(?=Key: |What is the special)", text)
        answers = [re.search(r'"([^"]+)"\n?$|text is (\d+)\.', one) for one in questions]
        assert [one[1] or one[2] for one in answers] == [solve(context, f"\n{one}") for one in questions]
        assert len(questions) == sessions.TURNS and len(text.encode()) < 2048
