"""Packing against a plain Python construction: concatenate documents, split, look one token ahead."""

import numpy as np
import pytest

from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import View, permutation
from hybridlm.data.tokenizer import Tokenizer

DOC = Tokenizer.doc_id


def documents(lengths, shards=1, seed=0):
    """Random byte documents of the given lengths (separator included), laid into ``shards`` flat arrays."""
    rng = np.random.default_rng(seed)
    texts = [np.concatenate([[DOC], rng.integers(0, 256, n - 1)]).astype(np.uint16) for n in lengths]
    shard_N = np.arange(len(texts)) % shards
    arrays, start_N = [], np.zeros(len(texts), np.int64)
    for shard in range(shards):
        parts = [np.zeros(3, np.uint16)]  # starts need not be 0
        for i in np.flatnonzero(shard_N == shard):
            start_N[i] = sum(map(len, parts))
            parts.append(texts[i])
        arrays.append(np.concatenate(parts))
    lengths = np.array([len(text) for text in texts], np.int64)
    read = lambda shard, start, stop: arrays[shard][start:stop]
    return Documents(read, shard_N.astype(np.int32), start_N, lengths, f"{seed}"), texts


def naive_rows(texts, order, seq_len):
    """Rows as lists of (token, target, segment, position), the last one padded."""
    stream = []
    for i in order:
        text = texts[i].tolist()
        stream += [(token, target, i) for token, target in zip(text, [*text[1:], DOC], strict=True)]
    rows = []
    for begin in range(0, len(stream), seq_len):
        row, segment, position, previous = [], 0, 0, None
        for token, target, i in stream[begin : begin + seq_len]:
            position = position + 1 if i == previous else 0
            segment += i != previous
            row.append((token, target, segment, position))
            previous = i
        rows.append(row + [(0, -1, 0, 0)] * (seq_len - len(row)))
    return rows


def as_tuples(batch):
    names = ("tokens", "targets", "segment_ids", "positions")
    return np.stack([batch[name] for name in names], axis=-1).tolist()


@pytest.mark.parametrize("lengths", [[5], [2] * 9, [40, 2, 3, 16, 17, 2, 31], [16, 16], [3, 100, 4]])
@pytest.mark.parametrize("shards", [1, 3])
def test_held_out_rows_are_the_naive_rows(lengths, shards):
    packed, texts = documents(lengths, shards)
    source = PackedDocuments(packed, Tokenizer(), View("val", 16, 7, 257))
    rows = as_tuples(source.rows(np.arange(source.num_rows)))
    order = permutation(len(texts), 0, 0, 0).tolist()
    assert rows == [[list(place) for place in row] for row in naive_rows(texts, order, 16)]


@pytest.mark.parametrize("seq_len", [1, 7, 16, 500])
def test_every_document_appears_once_an_epoch(seq_len):
    lengths = np.random.default_rng(1).integers(2, 60, 30)
    packed, texts = documents(lengths, shards=2)
    source = PackedDocuments(packed, Tokenizer(), View("train", seq_len, 3, 257))
    assert source.num_rows == -(-lengths.sum() // seq_len)
    orders = []
    for epoch in range(3):
        rows = source.rows(epoch * source.num_rows + np.arange(source.num_rows))
        place = np.argsort(permutation(source.num_rows, 3, epoch, 1))  # the row order undone
        real = rows["segment_ids"][place].ravel() > 0
        assert real.sum() == lengths.sum() and real[: lengths.sum()].all()  # padding only at the end
        stream = rows["tokens"][place].ravel()[real]
        found = [part.tolist() for part in np.split(stream, np.flatnonzero(stream == DOC))[1:]]
        assert sorted(found) == sorted(text.tolist() for text in texts)
        assert (rows["targets"][place].ravel()[real] == np.append(stream[1:], DOC)).all()
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_rows_of_a_long_document_are_spread():
    """Without a shuffle of rows, consecutive rows would be consecutive pieces of the one document."""
    packed, _ = documents([16 * 64])
    source = PackedDocuments(packed, Tokenizer(), View("train", 16, 0, 257))
    flat = packed.read(0, 3, 3 + 16 * 64).reshape(-1, 16).tolist()
    places = [flat.index(row) for row in source.rows(np.arange(64))["tokens"].tolist()]
    assert sorted(places) == list(range(64))
    assert np.mean(np.diff(places) == 1) < 0.2


def test_seed_orders_training_and_not_validation():
    packed, _ = documents([9] * 40)
    rows = {
        (split, seed): PackedDocuments(packed, Tokenizer(), View(split, 16, seed, 257)).rows(np.arange(20))
        for split in ("train", "val")
        for seed in (0, 1)
    }
    assert (rows["train", 0]["tokens"] != rows["train", 1]["tokens"]).any()
    assert (rows["val", 0]["tokens"] == rows["val", 1]["tokens"]).all()


def test_describe_counts_the_padding():
    packed, _ = documents([10, 11])
    source = PackedDocuments(packed, Tokenizer(), View("train", 16, 0, 257))
    assert source.describe() == (
        "2 documents (0 longer than a row), 21 tokens, 2 rows of 16 (11 padding tokens in the last)"
    )
