"""Probes against direct computation on a model whose every layer can be read."""

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import probes, subject
from eval.tasks import base
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.context import Context
from hybridlm.data import tokenizer
from hybridlm.rows import single_document
from tests import tiny


@pytest.fixture(scope="module")
def tested():
    config = tiny.config("python-stdlib:", model__pattern="retnet full", train__seq_len=512)
    config.mixers.retnet.conv_size = 0
    config.mixers.full.update(rope_theta=0.0, logit_scale=0.7)
    config = configs.resolve(config)
    definition = lm.build(config)
    params = jax.jit(lambda key: lm.init(definition, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 3 else x, params)
    return subject.Subject(definition, params, tokenizer.load("bytes"), config, 1)


def test_states_are_those_that_decoding_reaches(tested):
    tokens = [256, *b"the state of a gate"]
    measured = probes.states(tested, tokens, [4, 12])
    model = lm.merge(tested.definition, tested.params)
    blocks = model.unstacked()
    step = jax.jit(lambda token, rows, cache: model.step(token, rows, cache, blocks))
    cache = model.init_cache(1, 20)
    for place, token in enumerate(tokens[:12]):
        rows = jax.tree.map(lambda x: x[:, 0], single_document(1, 1))._replace(positions=jnp.array([place]))
        _, cache = step(jnp.array([token]), rows, cache)
    state = np.asarray(cache[0].state[0])
    assert list(measured) == [0]  # attention has no state
    assert measured[0][1, 0] == pytest.approx(np.linalg.norm(state, axis=(1, 2)).mean(), rel=1e-4)
    assert (measured[0][:, 1] >= 1).all() and measured[0][1, 1] <= min(state.shape[1:]) + 1e-6


@pytest.mark.once
def test_attention_mass(tested):
    """Against a softmax over all keys, written out; and what lies on all parts is 1."""
    tokens, span = [256, *b"one of the numbers"], (4, 9)
    masses = probes.attention_mass(tested, tokens, span)
    whole = probes.attention_mass(tested, tokens, (0, len(tokens)))
    assert list(masses) == [1] and masses[1].shape == (4,)
    np.testing.assert_allclose(whole[1], 1, rtol=1e-5)
    parts = [probes.attention_mass(tested, tokens, part)[1] for part in ((0, 4), (9, len(tokens)))]
    np.testing.assert_allclose(masses[1] + sum(parts), 1, rtol=1e-5)

    model = lm.merge(tested.definition, tested.params)
    rows = single_document(1, len(tokens))
    (first, _), (second, _) = model.unstacked()
    hidden = second.mixer_norm(first(model.embedding[...][jnp.array([tokens])], Context(rows), None)[0])
    q, k = (
        np.asarray(x).reshape(len(tokens), 4, -1)
        for x in (second.mixer.q_proj(hidden)[0], second.mixer.k_proj(hidden)[0])
    )
    scores = np.einsum("hk,thk->ht", q[-1], k) * 0.7
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = (weights / weights.sum(axis=1, keepdims=True))[:, slice(*span)].sum(axis=1)
    np.testing.assert_allclose(masses[1], want, rtol=1e-4)


def test_needles_stand_where_they_are_wanted(tested):
    for depth in (0.0, 0.5, 0.99):
        prompt, answer, behind = probes.needles(tested, random.Random(0), 2000, 3, depth)
        tokens = tested.encode(prompt)
        assert len(tokens) <= 2000 - 16 and prompt.count("One of the special magic numbers") == 3
        at = tested.text_tokenizer.decode(tokens[len(tokens) - behind + 1 :])
        assert at.startswith("One of the special magic numbers") and answer.strip() in at.split("\n")[0]
        assert abs((1 - behind / len(tokens)) - depth * 0.9) < 0.12
    tokens, (start, end) = probes.example(tested, 1000)
    shown = tested.text_tokenizer.decode(tokens[start:end])
    assert shown.startswith("One of the special") and shown.endswith(".")


def test_a_length_too_short_is_told_what_all_rows_need(tested, monkeypatch):
    """Not what the smallest needs, at which the next row would be refused."""
    needed = r"at least (\d+) tokens"
    with pytest.raises(base.TooShort, match=needed) as refused:
        probes.recall(tested, 400, samples=1)
    length = int(re.search(needed, str(refused.value))[1]) + 16  # 16 for the answer
    monkeypatch.setattr(subject.Subject, "log_likelihoods", lambda self, asked: [(0.0, True)] * len(asked))
    assert probes.recall(tested, length + 100, samples=1).accuracy.min() == 1  # keys differ in length


def wide_vocabulary(definition: lm.Definition) -> lm.Definition:
    return dataclasses.replace(definition, model=dataclasses.replace(definition.model, vocab_size=512))


@pytest.mark.once
def test_pictures_and_readings(tested, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PAIRS", (1, 2))
    monkeypatch.setattr(probes, "DEPTHS", 2)
    readings = probes.run(tested, tmp_path, length=512, samples=2)
    assert set(readings) == {"probe_recall.png", "probe_states.png", "probe_attention.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in readings)
    assert json.loads((tmp_path / "probes.json").read_text())["recall"]["pairs"] == [1, 2]

    class Perfect:
        """Right on every label, without text."""

        tokenizer, definition = None, wide_vocabulary(tested.definition)
        rows_per_batch = staticmethod(lambda length: 4)
        token_scores = staticmethod(lambda batch: (None, batch["targets"] >= 0))

    grid = probes.recall(Perfect, 64, 8)
    assert grid.pairs == [4, 8, 16] and set(grid.accuracy[np.isfinite(grid.accuracy)]) == {1.0}
    assert probes.draw_recall(grid, tmp_path / "x.png").startswith("half or more is recalled up to 16 pairs")
