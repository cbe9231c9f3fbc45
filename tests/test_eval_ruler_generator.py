"""RULER's prompts and scores against those of its published generator, which a package ships.

    pip install --no-deps nvidia-long-context-eval==26.3 tenacity

Its scripts read their arguments as they are imported, so each is imported with arguments of its own.
"""

import importlib.util
import random
import re
import sys
import types

import pytest

from eval import haystack
from eval.tasks import base, ruler, ruler_qa
from hybridlm.data import tokenizer

pytest.importorskip("long_context_eval", reason="RULER's generator is not installed; see the module")
BYTES = tokenizer.load("bytes")
OURS = {task.name: task for task in (*ruler.TASKS, *ruler_qa.TASKS)}
NAMES = {"vt": "variable_tracking", "cwe": "common_words", "fwe": "frequent_words"}
ESSAY = {"type_haystack": "essay"}
SETTINGS = {  # synthetic.yaml
    "niah_single_1": {"type_haystack": "repeat"},
    "niah_single_2": ESSAY,
    "niah_single_3": ESSAY | {"type_needle_v": "uuids"},
    "niah_multikey_1": ESSAY | {"num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": ESSAY | {"num_needle_v": 4},
    "niah_multiquery": ESSAY | {"num_needle_q": 4},
}


def generator(script, task, monkeypatch, length=4096, **settings):
    """Its module, with bytes for tokens and sentences cut as ours are."""
    package = importlib.import_module("long_context_eval.data.synthetic")
    constants = importlib.import_module("long_context_eval.data.synthetic.constants")
    known = constants.TASKS[task]
    named = types.ModuleType("tokenizer")
    text_to_tokens = lambda self, text: list(text.encode())
    tokens = type("Bytes", (), {"text_to_tokens": text_to_tokens})
    named.select_tokenizer = lambda kind, path: tokens()
    punkt = types.ModuleType("nltk.tokenize")
    punkt.sent_tokenize = haystack.sentences
    stand_in = {"tokenizer": named, "long_context_eval.data.tokenizer": named, "constants": constants}
    stand_in |= {"nltk": types.ModuleType("nltk"), "nltk.tokenize": punkt}
    for name, module in stand_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    if script == "niah":  # all pairs of words, sorted, take it a minute
        words = importlib.import_module("wonderwords.random_word")
        monkeypatch.setattr(
            words, "_get_words_from_text_file", lambda file: [f"{file[:4]}{i}" for i in range(9)]
        )
    given = {"save_dir": "x", "save_name": "x", "tokenizer_path": "x", "max_seq_length": length,
             "tokens_to_generate": known["tokens_to_generate"], "num_samples": 1,
             "template": known["template"] + known["answer_prefix"], **settings}  # fmt: skip
    monkeypatch.setattr(sys, "argv", [script, *(f"--{k}={v}" for k, v in given.items())])
    spec = importlib.util.spec_from_file_location(f"ruler_{script}", f"{package.__path__[0]}/{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(name, words=None, length=4096):
    text = haystack.load(haystack.ESSAYS) if words is None else words
    return OURS[name].samples(BYTES, base.Setting(length, 1, 0, text))[0]


NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for [\w-]+(?: [\w-]+)* is: [\w-]+\.")


def masked(prompt):
    """The prompt with its drawn parts masked, and the rest of its context once for each kind of line."""
    before, rest = prompt.split("\n", 1)
    context, question = rest.rsplit("\nWhat", 1)
    query = re.search(r" for (.+?) mentioned in", question)[1]
    shape = re.sub(r"[\w-]+(?: [\w-]+)*?(?=, |$)", "KEY", query.replace("and ", ""))
    lines = {NEEDLE.sub(r"NEEDLE \1", line) for line in context.split("\n")}
    return before, question.replace(query, "QUERY"), shape, lines, len(NEEDLE.findall(context))


@pytest.mark.parametrize("name", SETTINGS)
def test_needles(name, monkeypatch):
    theirs = generator("niah", "niah", monkeypatch, **SETTINGS[name])
    mine = ours(name).prompt
    if SETTINGS[name]["type_haystack"] == "essay":
        prompt, answers = theirs.generate_input_output(300)
        for one in (prompt, mine):  # what stands around the needles is the beginning of the essays
            text = NEEDLE.sub(" ", one.split("\n", 1)[1].rsplit("\nWhat", 1)[0])
            essay = " ".join(theirs.haystack)
            assert " ".join(text.split()) == " ".join(essay.split())[: len(" ".join(text.split()))]
        one_line = lambda found: (*found[:3], found[4])
        assert one_line(masked(mine)) == one_line(masked(prompt))
    else:
        prompt, answers = theirs.generate_input_output(20)
        needle_lines = SETTINGS[name]["type_haystack"] == "needle"
        assert masked(mine)[: 4 if needle_lines else 5] == masked(prompt)[: 4 if needle_lines else 5]
    assert len(ours(name).answers) == len(answers)


def test_variable_tracking(monkeypatch):
    theirs = generator("variable_tracking", "variable_tracking", monkeypatch)
    shot = theirs.sys_vartrack_w_noise_random(1, 2500, incremental=5)[0]
    prompt = theirs.sys_vartrack_w_noise_random(1, 6000, icl_example=shot)[0]["input"]

    def masked(text):
        """Without the assignments, and filler once, to the last space."""
        text = re.sub(r"VAR [A-Z]+ = (\d+|VAR [A-Z]+ ) ?", "", text)
        text = re.sub(f"({re.escape(ruler.NOISE)}\n ?)+", "FILLER", text)
        return re.sub(r"\b[A-Z]{3}\b|\b[A-Z]{5}\b", "NAME", re.sub(r"\d{5}", "VALUE", text))

    assert masked(ours("variable_tracking").prompt) == masked(prompt)


@pytest.mark.parametrize("length", [2048, 8192])
def test_words(length, monkeypatch):
    theirs = generator("common_words_extraction", "common_words_extraction", monkeypatch, length)
    prompt, answers = theirs.generate_input_output(40)
    mask = lambda text: re.sub(
        r"(\d+\. [\w' -]+?(?= \d+\. |\n|$))( \d+\. [\w' -]+?(?= \d+\. |\n|$))*", "W", text
    )
    mine = ours("common_words", length=length)
    assert mask(mine.prompt) == mask(prompt) and len(mine.answers) == len(answers) == 10
    shots = [text.split("\nQuestion")[0].split("often.\n")[1].split() for text in (mine.prompt, prompt)]
    counts = [sorted(one.count(word) for word in set(one) if not word[0].isdigit()) for one in shots]
    assert counts[0][-3:] == counts[1][-3:]
    theirs = generator("freq_words_extraction", "freq_words_extraction", monkeypatch, length)
    prompt, answers, _ = theirs.generate_input_output(
        length, vocab_size=length // 50, incremental=length // 32
    )
    coded = re.compile(r"(?<=words\. )[a-z. ]+(?=\nQuestion)")
    mine = ours("frequent_words", length=length)
    assert coded.sub("C", mine.prompt) == coded.sub("C", prompt) and len(answers) == len(mine.answers) == 3
    shares = [[coded.search(text)[0].split().count(a) for a in given] for text, given in
              ((mine.prompt, mine.answers), (prompt, answers))]  # fmt: skip
    assert all(abs(a / b - c / d) < 0.35 for (a, b, _), (c, d, _) in [shares])


@pytest.mark.parametrize(("name", "data"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_questions(name, data, monkeypatch):
    """Word for word, with the same seeds for what is drawn."""
    theirs = generator("qa", "qa", monkeypatch, dataset=data)
    read = ruler_qa.corpus(data)
    assert list(read.documents) == theirs.DOCS and len(read.questions) == len(theirs.QAS)
    for index in (0, 3, 77, 400):
        for count in (10, 25, 120):
            random.seed(index)
            prompt, answers = theirs.generate_input_output(index, count)
            question = read.questions[index]
            assert ruler_qa.prompt(read, question, count, random.Random(index), random.Random(42)) == prompt
            assert list(question.answers) == answers
    mine = OURS[name].samples(BYTES, base.Setting(16_000, 3, 0, None))
    assert [s.answers for s in mine] == [q.answers for q in read.questions[:3]]
    assert all(15_000 < len(s.prompt.encode()) + 33 <= 16_000 for s in mine)
    moved = OURS[f"{name}_anywhere"].samples(BYTES, base.Setting(16_000, 3, 0, None))
    assert moved[0].prompt != mine[0].prompt and moved[0].answers == mine[0].answers


def test_scores():
    theirs = importlib.import_module("long_context_eval.eval.synthetic.constants")
    said = ["It is ABC, 12", "no", "abc", ""]
    refs = [["abc", "x"], ["yes"], ["ABC", "12"], ["z"]]
    part, every = (theirs.TASKS[name]["metric_fn_per_sample"](said, refs) for name in ("qa", "niah"))
    assert [100 * base.any_contained(s, r) for s, r in zip(said, refs, strict=True)] == part
    assert [100 * base.share_contained(s, r) for s, r in zip(said, refs, strict=True)] == every
    assert OURS["qa_1"].score is base.any_contained and OURS["niah_multivalue"].score is base.share_contained
    settings = importlib.import_module("long_context_eval.data.synthetic.constants").TASKS
    for name, task in (("niah_single_1", "niah"), ("variable_tracking", "variable_tracking"), ("qa_2", "qa"),
                       ("common_words", "common_words_extraction"),
                       ("frequent_words", "freq_words_extraction")):  # fmt: skip
        assert OURS[name].max_new_tokens == settings[task]["tokens_to_generate"]
