"""MQAR against its definition: each example by itself, and the distributions over many."""

import numpy as np
import pytest

from hybridlm.data import mqar
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

V = 128


def rows_of(n, seq_len=64, split="train", seed=0, vocab=V, first=0, **fields):
    source = mqar.Config(**fields).open(View(split, seq_len, seed, vocab))
    return source.rows(np.arange(first, first + n))


@pytest.mark.parametrize("random_non_queries", [True, False])
def test_examples_follow_the_definition(random_non_queries):
    n, length = 6, 48
    batch = rows_of(500, length, num_pairs=n, random_non_queries=random_non_queries)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        keys, values = tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2]
        assert len(set(keys)) == len(set(values)) == n
        assert keys.min() >= 1 and keys.max() < V // 2 <= values.min() and values.max() < V
        places = np.flatnonzero(targets != -1)
        assert len(places) == n and places.min() >= 2 * n and (places % 2 == 0).all()
        assert sorted(tokens[places]) == sorted(keys)  # each key is asked for once
        answer = dict(zip(keys, values, strict=True))
        assert [answer[key] for key in tokens[places]] == targets[places].tolist()
        if not random_non_queries:
            assert (np.delete(tokens[2 * n :], places - 2 * n) == 0).all()
    assert (batch["segment_ids"] == 1).all() and (batch["positions"] == np.arange(length)).all()


def test_filler_is_uniform_over_the_whole_vocabulary():
    batch = rows_of(2000, num_pairs=2)
    filler = batch["tokens"][:, 4:][batch["targets"][:, 4:] == -1]
    counts = np.bincount(filler, minlength=V)
    assert np.abs(counts / counts.mean() - 1).max() < 5 / np.sqrt(counts.mean())


def test_keys_and_values_are_uniform():
    batch = rows_of(4000, num_pairs=4)
    for tokens, low, high in ((batch["tokens"][:, 0:8:2], 1, 64), (batch["tokens"][:, 1:8:2], 64, 128)):
        counts = np.bincount(tokens.ravel(), minlength=V)[low:high]
        assert counts.sum() == tokens.size
        assert np.abs(counts / counts.mean() - 1).max() < 5 / np.sqrt(counts.mean())


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power_a):
    """Each pair's gap against the definition's own sampler, NumPy's weighted choice without replacement."""
    n, length, examples = 3, 46, 20_000
    space = (length - 2 * n) // 2
    batch = rows_of(examples, length, num_pairs=n, power_a=power_a, random_non_queries=False)
    keys = batch["tokens"][:, 0 : 2 * n : 2]
    where = batch["tokens"][:, None, 2 * n :] == keys[:, :, None]
    gaps = where.argmax(axis=-1) // 2
    j = np.arange(1, space + 1)
    p = power_a * j ** (power_a - 1.0)
    p /= p.sum()
    first = np.bincount(gaps[:, 0], minlength=space) / examples
    assert np.abs(first - p).max() < 5 * np.sqrt(p.max() / examples)
    rng = np.random.RandomState(0)
    expected = np.stack([rng.choice(space, n, replace=False, p=p) for _ in range(examples)])
    for i in range(n):
        ours, theirs = (np.bincount(g[:, i], minlength=space) / examples for g in (gaps, expected))
        assert np.abs(ours - theirs).max() < 7 * np.sqrt(theirs.max() / examples)
        assert gaps[:, i].mean() == pytest.approx(
            expected[:, i].mean(), abs=6 * space / np.sqrt(12 * examples) * 2
        )


def test_rows_are_a_function_of_index_seed_and_split():
    whole = rows_of(600)["tokens"]
    assert (rows_of(20, first=550)["tokens"] == whole[550:570]).all()  # across no shared block boundary
    assert len(np.unique(whole, axis=0)) == 600
    assert (rows_of(600, seed=1)["tokens"] != whole).any(axis=1).all()
    held = rows_of(600, split="val")["tokens"]
    assert (held != whole).any(axis=1).all()
    assert (rows_of(600, split="val", seed=1)["tokens"] == held).all()


def test_short_examples_are_packed_and_the_rest_is_padding():
    batch = rows_of(50, 70, slices="(32, 4)", vocab=V)
    assert (batch["segment_ids"] == [1] * 32 + [2] * 32 + [0] * 6).all()
    assert (batch["positions"] == [*range(32), *range(32), *[0] * 6]).all()
    assert (batch["tokens"][:, 64:] == 0).all() and (batch["targets"][:, 64:] == -1).all()
    apart = rows_of(100, 32, num_pairs=4)
    for name in ("tokens", "targets"):
        assert (batch[name][:, :64].reshape(100, 32) == apart[name]).all()


def test_slices_are_mixed_by_weight():
    batch = rows_of(4096, 64, slices="(64, 4, 3), (32, 2)", vocab=V)
    packed = batch["segment_ids"].max(axis=1) == 2
    assert packed.mean() == 0.25
    asked = (batch["targets"] >= 0).sum(axis=1)
    assert (asked == 4).all()  # one example of 4 pairs, or two of 2


def test_sets_of_examples_are_finite_where_asked():
    source = mqar.Config(num_pairs=4, val_examples=5, slices="(32, 4)").open(View("val", 64, 0, V))
    assert source.num_rows == 3
    last = source.rows(np.array([2]))
    assert (last["segment_ids"][0] == [1] * 32 + [0] * 32).all() and (last["targets"][0, 32:] == -1).all()
    two = mqar.Config(slices="(32, 4), (64, 4)", val_examples=5).open(View("val", 64, 0, V))
    assert two.num_rows == 3 + 5
    train = mqar.Config(num_pairs=4, train_examples=40).open(View("train", 64, 0, V))
    first, second = (train.rows(np.arange(e * 40, e * 40 + 40))["tokens"].tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) and first != second and len({tuple(row) for row in first}) == 40


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"num_pairs": 17}, "num_pairs", "4 \\* pairs <= length, here 64"),
        ({"num_pairs": 0}, "num_pairs", "1 <= pairs"),
        ({"slices": "(128, 4)"}, "slices", "up to train.seq_len = 64"),
        ({"slices": "(64, 4), 8"}, "slices", "must read like"),
        ({"slices": "(64, 4"}, "slices", "must read like"),
        ({"slices": "(64, 4, -1)"}, "slices", "must read like"),
        ({"slices": "(64, 4), (64, 4)"}, "slices", "twice"),
        ({"num_pairs": 4, "vocab": 64}, "num_pairs", "length < model.vocab_size = 64"),
    ],
)
def test_impossible_sizes_are_refused(fields, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        rows_of(1, **fields)
    assert error.value.field == field
