"""What prepare writes, shards reads back: every document once, under its split, in every format."""

import errno
import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybridlm.data import holdout, shards
from hybridlm.data import tokenizer as tokenizer_module
from hybridlm.data.prepare import main, prepare
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

TEXTS = [f"document {i}: " + "naïve ☃\n" * (i % 7) for i in range(50)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same texts in every format: {name of the format: (glob, [(key, text)])}."""
    root = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (root / f"{i:02}.txt").write_text(text)
    lines = "\n".join(json.dumps({"text": text}) for text in [*TEXTS, ""]).encode()
    (root / "a.jsonl").write_bytes(lines)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), root / "a.parquet", row_group_size=9)
    keyed = {
        name: [(f"{name}#{i}", text) for i, text in enumerate(TEXTS, 1)]
        for name in ("a.jsonl", "a.jsonl.gz", "a.parquet")
    }
    documents = {name: (str(root / name), keys) for name, keys in keyed.items()}
    return documents | {"txt": (f"{root}/*.txt", [(f"{i:02}.txt", text) for i, text in enumerate(TEXTS)])}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "my_tokenizer.json"
    file = tokenizers.Tokenizer(models.BPE())
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    file.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    file.save(str(path))
    return str(path)


def read_back(path, split):
    """(texts of the split in the order of the shards, its tokenizer)."""
    source = shards.open_source(shards.Config(str(path)), View(split, 32, 0, 1 << 16))
    d, tokens = source.documents, source.tokenizer
    texts = []
    for shard, start, length in zip(d.shard_N, d.start_N, d.length_N, strict=True):
        ids = d.arrays[shard][start : start + length]
        assert ids[0] == tokens.doc_id and not (ids[1:] == tokens.doc_id).any()
        texts.append(tokens.decode(ids))
    return texts, source


@pytest.mark.parametrize("form", ["txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip(tmp_path, corpus, bpe, form, kind):
    glob, documents = corpus[form]
    index = prepare(
        glob, str(tmp_path / "out"), bpe if kind == "bpe" else "bytes", holdout=0.2, shard_tokens=30
    )
    held = {key for key, _ in documents if holdout.held_out(key, 0.2)}
    assert 3 < len(held) < 20
    for split in ("train", "val"):
        expected = [text for key, text in documents if (key in held) == (split == "val")]
        texts, source = read_back(tmp_path / "out", split)
        assert texts == expected
        entry = index["splits"][split]
        assert entry["documents"] == len(expected)
        assert entry["text_bytes"] == sum(len(text.encode()) for text in expected)
        assert entry["tokens"] == sum(len(source.tokenizer.encode(text)) + 1 for text in expected)
        assert len(entry["shards"]) > 1 and all(s["tokens"] < 30 + 90 for s in entry["shards"])
        # The rows hold the same documents again.
        rows = source.rows(np.arange(source.num_rows))
        assert (rows["segment_ids"] > 0).sum() == entry["tokens"]
        assert (
            source.tokenizer.token_bytes[rows["targets"][rows["targets"] >= 0]].sum() == entry["text_bytes"]
        )
    assert not (tmp_path / "out.partial").exists()


def test_formats_agree(tmp_path, corpus):
    fingerprints = set()
    for form in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        index = prepare(corpus[form][0], str(tmp_path / form), "bytes")
        [shard] = index["splits"]["train"]["shards"]
        fingerprints.add(shard["sha256"])
    assert len(fingerprints) == 1


def test_command_prints_exact_totals(tmp_path, corpus):
    glob, documents = corpus["txt"]
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "hybridlm.data.prepare",
        "--input",
        glob,
        "--output",
        str(out),
        "--tokenizer",
        "bytes",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = sum(len(text.encode()) for _, text in documents)
    assert (
        f"train: 50 documents, {size:,} bytes, {size + 50:,} tokens (one separator a document), 1 shards"
        in done.stdout
    )
    assert "vocab_size 257, uint16, tokenizer bytes" in done.stdout
    assert "tokenising" in done.stderr  # the progress bar
    assert "RuntimeWarning" not in done.stderr


def test_main_reports_errors_without_a_trace(tmp_path, capsys):
    flags = ["--input", str(tmp_path / "*.txt"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(flags) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("matches no file. Check the glob; ** descends into directories.")
    )


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"output": "taken"}, "--output", "exists already"),
        ({"output": "busy"}, "--output", "unfinished busy.partial"),
        ({"output": "file/out"}, "--output", "cannot be created"),
        ({"tokenizer_name": "gone.json"}, "--tokenizer", "No such file"),
        ({"holdout": 1.5}, "--holdout", "must be in"),
        ({"inputs": "empty"}, "--input", "no tokens to train on"),
        ({"inputs": "empty", "holdout": 0.1}, "--input", "no tokens to train on"),
        (
            {"inputs": "short", "holdout": 0.1},
            "--input|--holdout",
            "nothing to hold out|no tokens to train on",
        ),
        ({"inputs": ""}, "--input", "must name files"),
        ({"holdout": 0.1, "val_inputs": "short"}, "--holdout", "must be 0 where"),
        ({"tokenizer_name": ""}, "--tokenizer", "must be"),
        ({"train_bpe": 300}, "--tokenizer", "must be"),
        ({"tokenizer_name": "", "train_bpe": 100}, "--train_bpe", "more than 257"),
        ({"tokenizer_name": "", "train_bpe": 100_000}, "--train_bpe", "ids that this text gives"),
        ({"shard_tokens": 0}, "--shard_tokens", "must be positive"),
        ({"text_field": "body"}, "--input", "has no text in 'body'"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, corpus, changes, field, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "busy.partial").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a")
    for name in ("inputs", "val_inputs"):
        if changes.get(name):
            changes = changes | {name: f"{tmp_path}/{changes[name]}.txt"}
    before = sorted(tmp_path.iterdir())
    arguments = {"inputs": corpus["a.jsonl"][0], "output": "out", "tokenizer_name": "bytes"} | changes
    arguments["output"] = str(tmp_path / arguments["output"])
    with pytest.raises(ConfigError, match=message) as error:
        prepare(**arguments)
    assert error.value.field in field.split("|")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, corpus, monkeypatch):
    def full(self, tokens, text_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.Writer, "add", full)
    with pytest.raises(ConfigError, match="No space left on device. Nothing was kept"):
        prepare(corpus["txt"][0], str(tmp_path / "out"), "bytes")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, corpus, monkeypatch):
    def interrupt(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_module.Tokenizer, "documents", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus["txt"][0], str(tmp_path / "out"), "bytes")
    assert list(tmp_path.iterdir()) == []
