"""Counting, phonebook, latent recall and regression, each solved by a program that reads tokens only."""

import re

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data import counting, latent_recall, phonebook, regression
from hybridlm.errors import ConfigError
from tests.test_data_generated import rows_of


def test_counts():
    tokens, targets = rows_of("counting", 512, 65, vocab=128, elements=64, ids=32)
    counted = [row[1:].tolist().count(row[-1]) for row in tokens]
    assert (targets[:, -1] - 32).tolist() == counted and (targets[:, :-1] == -1).all()
    assert (tokens[:, 0] == 0).all() and set(tokens[:, 1:].reshape(-1)) == set(range(1, 33))
    most = max(counted.count(c) for c in set(counted)) / len(counted)
    assert abs(most - counting.constant(64, 32)) < 3 * np.sqrt(0.25 / 512)
    assert counting.constant(2, 2) == 0.5 and counting.constant(1, 7) == 1


def test_a_reader_finds_the_number():
    tokens, targets = rows_of("phonebook", 64, phonebook.length(9), vocab=256, entries=9)
    asked = set()
    for row, target in zip(tokens, targets, strict=True):
        text = bytes(row.tolist()).decode()
        book, shown, question = text.split("\n\n")
        lines = dict(line.split(": ") for line in book.splitlines())
        assert len(lines) == 9 and set(shown.splitlines()) < set(book.splitlines())
        name, given = question.split(": ")
        number = lines[name]
        assert re.fullmatch(r"[6-9]\d{9}", number) and given == number[:-1] and name not in shown
        assert bytes(target[-10:].tolist()).decode() == number and (target[:-10] == -1).all()
        asked.add(list(lines).index(name))
    assert len(asked) > 5  # anywhere in the book


def test_topics_stand_for_cues():
    tokens, targets = rows_of("latent_recall", 256, 25, vocab=64, pairs=8, concepts=15)
    topic_of = 16 + latent_recall.topics(15)  # of cue 1, 2, ...
    assert sorted(topic_of) == list(range(16, 31))
    for row, target in zip(tokens, targets, strict=True):
        value_of = {topic_of[cue - 1]: value for cue, value in zip(row[0:16:2], row[1:16:2], strict=True)}
        assert row[16] == 0 and len(value_of) == 8 and sorted(row[17:]) == sorted(value_of)
        assert [value_of[topic] for topic in row[17:]] == target[17:].tolist()
        assert (target[:17] == -1).all() and not set(row[:16]) & set(row[17:])  # no token in common
        assert min(value_of.values()) >= 31
    train, _ = rows_of("latent_recall", 256, 25, "train", vocab=64, pairs=8, concepts=15)
    assert (train != tokens).any()  # other examples, by the same map


@pytest.mark.parametrize("segment", [0, 16])
def test_a_linear_map_is_found(segment):
    """Every answer fits weights of -1, 0, 1 of its segment (all 27 are tried); least squares finds them."""
    tokens, targets = rows_of("regression", 48, 96, vocab=64, features=3, segment=segment)
    np.testing.assert_array_equal(targets[:, 0::2], tokens[:, 1::2])
    assert (targets[:, 1::2] == -1).all() and tokens[:, 0::2].max() == 7
    weights = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    zero, known, late = 0, [], []
    for row in tokens:
        x = np.array([[1 if corner >> j & 1 else -1 for j in range(3)] for corner in row[0::2]])
        y = row[1::2] - 8 - 3
        zero += (y == 0).mean() / len(tokens)
        size = segment or len(y)
        for begin in range(0, len(y), size):
            part = slice(begin, begin + size)
            assert (weights @ x[part].T == y[part]).all(axis=1).sum() >= 1
        found = regression.least_squares(row, 3, segment) == row[1::2]
        known.append(found)
        late += [found[i] for i in range(len(y)) if i % size >= 12]
    assert np.mean(late) > 0.97 and 0.15 < np.mean(known, axis=0)[0] < 0.45
    assert abs(zero - regression.constant(3)) < 0.05 and regression.constant(1) == pytest.approx(1 / 3)
    stale = [regression.least_squares(row, 3)[40:] == row[1::2][40:] for row in tokens]
    assert (np.mean(stale) > 0.97) == (segment == 0)  # what was learnt before misleads


@pytest.mark.parametrize(
    ("kind", "seq_len", "fields", "field"),
    [
        ("counting", 64, {}, "elements"),
        ("counting", 80, {"elements": 70, "ids": 40}, "kind"),  # 111 ids
        ("phonebook", 200, {}, "kind"),  # 256 ids
        ("phonebook", 200, {"entries": 2}, "entries"),
        ("latent_recall", 24, {}, "pairs"),
        ("regression", 64, {"features": 7}, "kind"),  # 128 corners
        ("latent_recall", 200, {"concepts": 7}, "concepts"),
        ("latent_recall", 200, {"concepts": 50}, "concepts"),
    ],
)
def test_refusals(kind, seq_len, fields, field):
    with pytest.raises(ConfigError) as caught:
        data.build(
            {"kind": kind, **fields}, split="val", batch_size=2, seq_len=seq_len, seed=0, vocab_size=100
        )
    assert caught.value.field == f"data.{field}"
