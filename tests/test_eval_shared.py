"""Branches of a context that is read once, against rows of their own."""

import dataclasses

import jax
import numpy as np
import pytest

from eval import shared, subject
from hybridlm import config as configs
from hybridlm import generate
from hybridlm import model as lm
from hybridlm.data import tokenizer
from tests import tiny

pytestmark = pytest.mark.once  # test_eval asks for the same likelihoods on every jax


@pytest.fixture(scope="module")
def tested():
    """A window, a recurrence and full attention; short contexts, so that a batch holds several."""
    config = tiny.config("python-stdlib:", model__pattern="retnet swa full", train__seq_len=64)
    config.mixers.swa = configs.mixer("attention", num_heads=4, head_dim=8, window=5)
    config = configs.resolve(config)
    definition = lm.build(config)
    params = jax.jit(lambda key: lm.init(definition, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 3 else x, params)
    return subject.Subject(definition, params, tokenizer.load("bytes"), config, 1, batch_tokens=500)


CONTEXTS = ["the gate of a state ", "a key, a value and the query of a chunk; ", "decay "]
QUESTIONS = [["which?", " and what is the head", "k"], ["v", "the second one of all"], ["now"]]


def asked(tested):
    pairs = [(c, q) for c, questions in zip(CONTEXTS, QUESTIONS, strict=True) for q in questions]
    order = np.random.default_rng(0).permutation(len(pairs))  # equal contexts need not be neighbours
    return [(tested.encode(pairs[i][0]), list(pairs[i][1].encode())) for i in order]


def test_log_likelihoods_of_branches_are_those_of_whole_rows(tested, monkeypatch):
    pairs = asked(tested)
    want, used, done = tested._each(pairs, lambda done: None), [], []
    real = shared.scores
    monkeypatch.setattr(shared, "scores", lambda *args: used.append(1) or real(*args))
    got = tested.log_likelihoods(pairs, done.append)
    assert used and sum(done) == len(pairs)
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in want], rtol=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


@pytest.mark.slow
def test_answers_are_the_greedy_continuations_of_whole_prompts(tested):
    pairs = asked(tested)
    want = generate.continuations(
        tested.definition, tested.params, [c + q for c, q in pairs], max_new_tokens=6, stops=[256]
    )
    texts = [bytes(t for t in row if t < 256).decode(errors="replace") for row in want]
    done = []
    options = {"max_new_tokens": 6, "progress": done.append}
    assert tested.answer(*zip(*pairs, strict=True), **options) == texts and sum(done) == len(pairs)
    alone = dataclasses.replace(tested, batch_tokens=1)
    assert (
        alone.answer(*zip(*pairs, strict=True), **options) == texts
    )  # a group is cut, each part reads again
    stop = texts[0][2]
    cut = tested.answer(*zip(*pairs, strict=True), max_new_tokens=6, stop=["", stop])
    assert cut == [text[: text.find(stop)] if stop in text else text for text in texts]


def test_batches_hold_each_branch_once():
    groups = shared.grouped([(1, 2), (3,), (1, 2), (4,), (3,), (1, 2)])
    assert [group.members for group in groups] == [[0, 2, 5], [1, 4], [3]]
    following = [[7] * n for n in (1, 20, 3, 40, 5, 6)]
    seen = []
    for members, batch in shared.batches(groups, following, 4, 300):
        seen += members
        forced = np.asarray(batch.forced_BT)
        for row, index in enumerate(members):
            assert forced[row][forced[row] >= 0].tolist() == following[index]
    assert sorted(seen) == list(range(6))
