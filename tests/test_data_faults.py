"""Data that are damaged, empty, odd or gone: each has an answer, and the counts add up."""

import json
import logging
import os

import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import data, trainer, untrusted
from hybridlm.data import prepare
from hybridlm.data import shards as shards_module
from hybridlm.errors import ConfigError, RunError
from tests import tiny

SHRUNK = "the shard (has changed to \\d bytes while the run reads it|cannot be read)"  # by reader, check
SIZES = {"batch_size": 2, "seq_len": 16, "seed": 0, "vocab_size": 260}


@pytest.fixture
def shards(tmp_path):
    """Six shards of words."""
    tiny.write_text(tmp_path)
    prepare.prepare(f"{tmp_path}/*.txt", str(tmp_path / "shards"), "bytes", holdout=0.2, shard_tokens=1000)
    return tmp_path / "shards"


def opened(folder, split="train"):
    return data.build({"kind": "shards", "path": str(folder)}, split=split, **SIZES)


def edit(shards, change):
    index = json.loads((shards / "index.json").read_text())
    change(index)
    index["sha256"] = shards_module.index_sum(index)
    (shards / "index.json").write_text(json.dumps(index))


def test_a_flipped_bit_ends_the_run_before_anything_is_saved(shards, tmp_path):
    path = shards / "train-00002.tokens"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    dataset = opened(shards)
    dataset.verify()
    with pytest.raises(RunError, match=r"train-00002.tokens: the shard is damaged: its SHA-256"):
        dataset.verified()
    with pytest.raises(RunError, match=r"train-00002"):
        dataset.batch(0)
    other_share = opened(shards)
    other_share.verify(part=1, parts=2)  # shards 1, 3, 5: another process has this one
    other_share.verified()
    config = tiny.config("unused", checkpoint__every_steps=1)
    config.data = configs.data("shards", path=str(shards))
    with pytest.raises(RunError, match=r"the shard is damaged"):
        trainer.train(configs.resolve(config), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "the shard has disappeared while the run reads it"),
        *(
            (harm, SHRUNK)
            for harm in (lambda path: untrusted.write_bytes(path, b"x"), lambda path: os.truncate(path, 1))
        ),
    ],
)
def test_a_shard_that_disappears_or_shrinks_in_mid_run_ends_it_by_name(shards, harm, message):
    dataset = opened(shards)
    batches = dataset.iterate()
    next(batches)
    copies = {path: path.read_bytes() for path in shards.glob("train-*.tokens")}
    for path in copies:
        harm(path)
    with pytest.raises(RunError, match=rf"train-0000\d.tokens: {message}"):
        for _ in range(40):  # some were read ahead
            next(batches)


def test_a_check_that_cannot_be_made_is_a_failed_one(shards):
    dataset = opened(shards)

    def broken():
        raise KeyError("sha256")

    dataset.source.checks = [broken]
    dataset.verify()
    with pytest.raises(RunError, match=r"could not be checked \(KeyError: 'sha256'\)"):
        dataset.verified()
    with pytest.raises(RunError, match="could not be checked"):
        dataset.batch(0)


def test_a_shard_whose_check_cannot_read_it_is_damaged(shards):
    dataset = opened(shards)
    (shards / "train-00003.tokens").unlink()
    dataset.verify()
    with pytest.raises(RunError, match=r"train-00003.tokens: the shard cannot be read"):
        dataset.verified()


def test_missing_or_cut_before_the_start_is_refused(shards):
    (shards / "train-00001.offsets").unlink()
    with pytest.raises(ConfigError, match=r"data.path = .*is damaged: train-00001.offsets is missing"):
        opened(shards)


def test_an_empty_shard_is_passed_over_and_named(shards, caplog):
    whole = opened(shards).batch(3)["tokens"]

    def add(index):
        empty = {"name": "train-00099", "documents": 0, "tokens": 0, "sha256": ""}  # of no file
        index["splits"]["train"]["shards"].append(empty)

    edit(shards, add)
    dataset = opened(shards)
    np.testing.assert_array_equal(dataset.batch(3)["tokens"], whole)
    assert "shard train-00099 is empty" in caplog.text
    dataset.verify()
    dataset.verified()


def test_ids_beyond_the_vocabulary_are_named_with_their_document(shards):
    tokens = np.fromfile(shards / "train-00001.tokens", "<u2")
    tokens[len(tokens) // 2] = 300
    tokens.tofile(shards / "train-00001.tokens")
    dataset = opened(shards)
    with pytest.raises(RunError, match=r"token id 300 is .*257.*train-00001 document 0 tokens"):
        for step in range(dataset.num_rows // 2):
            dataset.batch(step)


def test_documents_that_are_empty_invalid_or_long_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = {"a": b"", "b": b"\xff\xfe broken \xc3", "c": b"x" * 100, "d": b"four", "e": b""}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    kind = {"kind": "text", "path": f"{tmp_path}/*.txt", "holdout": 0.0}
    dataset = data.build(kind, split="train", **SIZES)
    assert "left out 2 of 5 documents, which are empty" in caplog.text
    tokens = sum(len(text) + 1 for text in texts.values() if text)
    rows = -(-tokens // 16)
    assert dataset.source.describe() == (
        f"3 documents (1 longer than a row), {tokens} tokens, {rows} rows of 16 "
        f"({rows * 16 - tokens} padding tokens in the last)"
    )
    seen = np.concatenate([dataset.source.rows(np.array([row]))["tokens"].ravel() for row in range(rows)])
    assert sorted(seen[seen < 256].tolist()) == sorted(
        [*b"".join(texts.values()), *[0] * (rows * 16 - tokens)]
    )
    index = prepare.prepare(f"{tmp_path}/*.txt", str(tmp_path / "out"), "bytes")
    assert index["empty_documents"] == 2 and index["splits"]["train"]["documents"] == 3


def test_sample_ids_find_the_text_of_a_row(shards):
    dataset = opened(shards)
    batch, ids = dataset.batch(5), dataset.sample_ids(5)
    index = json.loads((shards / "index.json").read_text())
    assert len(ids) == 2 and index["splits"]["train"]["shards"]
    for row, text in zip(batch["tokens"], ids, strict=True):
        found = []
        for part in text.split(", "):
            name, _, document, _, first, _, last = part.split()
            offsets = np.fromfile(shards / f"{name}.offsets", "<u8").astype(int)
            flat = np.fromfile(shards / f"{name}.tokens", "<u2")[offsets[int(document)] :]
            found += flat[int(first) : int(last) + 1].tolist()
        assert found == row[: len(found)].tolist() and not row[len(found) :].any()
