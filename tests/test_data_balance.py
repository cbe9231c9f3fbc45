"""Documents of rows that devices share, moved: against counting pair by pair, and document by document."""

import numpy as np
import pytest

from hybridlm.data import Dataset
from hybridlm.data.balance import evened, work
from hybridlm.data.packing import PackedDocuments
from hybridlm.data.source import View
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.ring_attention import order
from tests.test_data_packing import documents

TOKENS, PIECES = 4096, 4


def rows(split="train", pieces=1):
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(3000), 80)).astype(int)
    view = View(split, TOKENS, 0, 257)
    return Dataset(PackedDocuments(documents(lengths)[0], Tokenizer(), view), view, 8, pieces=pieces)


def apart(row):
    """Its documents, [(tokens, targets, positions)], and how much padding is behind them."""
    ids = row["segment_ids"]
    padding = int((ids == 0).sum())
    assert (np.diff(ids[: TOKENS - padding]) >= 0).all() and not ids[TOKENS - padding :].any()
    assert sorted(set(ids[ids > 0])) == list(range(1, ids.max() + 1))
    names = "tokens", "targets", "positions"
    return [tuple(row[name][ids == i].tolist() for name in names) for i in range(1, ids.max() + 1)], padding


def busiest(row):
    """Of the devices, by the rule that they compute by: pairs of the busiest over their mean."""
    blocks = np.where(row["segment_ids"] > 0, row["positions"] + 1, 0).reshape(2 * PIECES, -1).sum(1)
    each = blocks[order(PIECES)].sum(1)
    return each.max() / each.mean()


def test_work_is_that_of_the_blocks_of_the_ring():
    lengths = np.array([[40, 3, 21], [1, 2, 61], [20, 20, 20]])
    for row, found in zip(lengths, work(lengths, 64, PIECES), strict=True):
        seen = np.concatenate([np.arange(1, n + 1) for n in row] + [np.zeros(64 - row.sum(), int)])
        assert found.tolist() == seen.reshape(2 * PIECES, -1).sum(1)[order(PIECES)].sum(1).tolist()


def test_documents_are_moved_whole_within_their_rows_and_even_out():
    given, found = rows(), rows(pieces=PIECES)
    before, after, moved = [], [], False
    for step in range(3):
        batch, other, whole = given.batch(step), found.batch(step), found.whole_batch(step)
        for b in range(8):
            one, two = ({name: x[name][b] for name in x} for x in (batch, other))
            (documents_a, padding_a), (documents_b, padding_b) = apart(one), apart(two)
            assert sorted(documents_a) == sorted(documents_b) and padding_a == padding_b
            assert busiest(two) <= busiest(one)
            moved |= documents_a != documents_b
            before.append(busiest(one))
            after.append(busiest(two))
        for name, array in other.items():
            np.testing.assert_array_equal(array, whole[name])
    assert moved and np.mean(after) - 1 < 0.7 * (np.mean(before) - 1), (np.mean(before), np.mean(after))
    assert found.fingerprint == given.fingerprint  # a run goes on over another number of devices


@pytest.mark.parametrize("ids", [[1] * 9 + [0] * 7, [1] * 16, [0] * 16])
def test_what_cannot_be_moved_stays(ids):
    batch = {"tokens": np.arange(16)[None], "segment_ids": np.array([ids])}
    assert all((evened(batch, 2)[name] == array).all() for name, array in batch.items())
