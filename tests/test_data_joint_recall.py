"""Joint recall against a program that keeps a dictionary of (context, key)."""

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data import joint_recall
from hybridlm.errors import ConfigError


def build(contexts, keys, seq_len, split="val", vocab_size=64, **fields):
    config = {"kind": "joint_recall", "contexts": contexts, "keys": keys, "val_examples": 300, **fields}
    return data.build(config, split=split, batch_size=300, seq_len=seq_len, seed=0, vocab_size=vocab_size)


@pytest.mark.parametrize(("contexts", "keys", "size"), [(5, 5, 112), (5, 16, 332), (16, 16, 1058)])
def test_a_dictionary_of_context_and_key_solves_it(contexts, keys, size):
    assert joint_recall.length(contexts, keys) == size  # 1058 is the paper's longest
    batch = build(contexts, keys, size).batch(0)
    values, differ = [], 0
    for tokens, targets in zip(batch["tokens"][:40], batch["targets"][:40], strict=True):
        known, context, half = {}, None, 0
        assert tokens[0] == 1 and (tokens == 4).sum() == 1
        for place, token in enumerate(tokens):
            half += token == 4
            context = token if token >= 42 else context
            if 26 <= token < 42:
                if half:
                    assert targets[place] == known[context, token] == tokens[place + 1]
                    values.append(targets[place])
                else:
                    assert targets[place] == -1 and (context, token) not in known
                    known[context, token] = tokens[place + 1]
            else:
                assert targets[place] == -1
        assert len(known) == contexts * keys == (targets >= 0).sum()
        one = [value for (_, key), value in known.items() if key == next(iter(known))[1]]
        differ += len(set(one)) > 1
    assert differ == 40  # a key alone does not tell
    assert set(values) == set(range(10, 26))


def test_examples_differ_and_are_packed():
    batch = build(5, 5, 230).batch(0)
    assert set(batch["segment_ids"][0].tolist()) == {0, 1, 2}
    real = batch["tokens"][batch["segment_ids"].any(axis=1)]
    assert len({row.tobytes() for row in real}) == len(real) == 150  # two a row
    assert not np.array_equal(build(5, 5, 112, "train").batch(0)["tokens"][0], batch["tokens"][0, :112])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"contexts": 17, "keys": 5, "seq_len": 2000}, "between 1 and 16"),
        ({"contexts": 5, "keys": 0, "seq_len": 2000}, "between 1 and 16"),
        ({"contexts": 8, "keys": 8, "seq_len": 273}, "seq_len >= 274"),
        ({"contexts": 5, "keys": 5, "seq_len": 128, "vocab_size": 57}, "at least 58"),
    ],
)
def test_refusals(fields, match):
    with pytest.raises(ConfigError, match=match):
        build(**fields)
