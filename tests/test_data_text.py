import gzip
from pathlib import Path

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data import files, holdout, text
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

DOC = 256


def rows_of(split="train", seq_len=32, seed=0, **fields):
    source = text.Config(**fields).open(View(split, seq_len, seed, 257))
    rows = source.rows(np.arange(source.num_rows))
    return source, rows


def documents_of(**fields):
    """The held-out documents, sorted, read back from the rows (whose order is that of the documents)."""
    source = text.Config(**fields).open(View("val", 64, 0, 257))
    rows = source.rows(np.arange(source.num_rows))
    stream = rows["tokens"][rows["segment_ids"] > 0]
    return sorted(bytes(part[1:].tolist()) for part in np.split(stream, np.flatnonzero(stream == DOC))[1:])


@pytest.fixture
def corpus(tmp_path):
    texts = {f"{i:03}.txt": bytes([i + 33]) * (i + 1) for i in range(60)}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path, texts


def test_splits_share_no_file_and_lose_none(corpus):
    folder, texts = corpus
    held = sorted(content for name, content in texts.items() if holdout.held_out(name, 0.3))
    train = sorted(content for name, content in texts.items() if not holdout.held_out(name, 0.3))
    assert held and train
    assert documents_of(path=f"{folder}/*.txt", holdout=0.3) == held
    source, rows = rows_of(path=f"{folder}/*.txt", holdout=0.3)
    assert source.num_tokens == sum(map(len, train)) + len(train)  # one separator a document
    tokens = rows["tokens"][rows["segment_ids"] > 0]
    assert sorted(tokens.tolist()) == sorted(b"".join(train)) + [DOC] * len(train)


def test_val_path_is_held_out_of_path(corpus):
    folder, texts = corpus
    fields = {"path": f"{folder}/*.txt", "val_path": f"{folder}/00*.txt"}
    assert documents_of(**fields) == sorted(texts[f"00{i}.txt"] for i in range(10))
    source, _ = rows_of(**fields)
    assert source.num_tokens == sum(len(texts[f"{i:03}.txt"]) + 1 for i in range(10, 60))


def test_invalid_utf8_is_kept_as_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    _, rows = rows_of(path=f"{tmp_path}/a.txt", holdout=0.0, seq_len=4)
    assert rows["tokens"].tolist() == [[DOC, 0xFF, 0xFE, 0]]
    assert rows["targets"].tolist() == [[0xFF, 0xFE, 0, DOC]]


def test_fingerprint_follows_the_content(corpus):
    folder, _ = corpus

    def fingerprint():
        return rows_of(path=f"{folder}/*.txt")[0].fingerprint

    before = fingerprint()
    assert before == fingerprint()
    (folder / "059.txt").write_bytes(b"!" * 60)
    assert before != fingerprint()


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"path": "{}/none*.txt"}, "path", "matches no file"),
        ({"path": "{}/empty.txt", "holdout": 0.0}, "path", "gives no tokens"),
        ({"path": "{}/000.txt", "holdout": 1e-9, "split": "val"}, "holdout", "cannot cut a text of 1 bytes"),
        ({"path": "{}/*.txt", "holdout": 0.0, "split": "val"}, "holdout", "holds out nothing"),
        ({"path": "{}/*.txt", "val_path": "{}/*.txt"}, "val_path", "holds out every file"),
        ({"path": "{}/a.JSONL.gz", "holdout": 0.0}, "path", "holds records, not one text"),
        ({"path": "{}/*.txt", "val_path": "{}/gone"}, "val_path", "does not exist"),
        ({"path": "{}/0*.txt", "val_path": "{}/empty.txt", "split": "val"}, "val_path", "gives no tokens"),
        ({"path": "{}/*.txt", "tokenizer": "gone.json"}, "tokenizer", "No such file"),
        ({"path": "{}/a.jsonl", "holdout": 0.0}, "path", "Run python -m hybridlm.data.prepare"),
    ],
)
def test_unusable_settings_are_refused(corpus, fields, field, message):
    folder, _ = corpus
    (folder / "a.jsonl").write_text('{"text": "x"}')
    (folder / "a.JSONL.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    fields = {name: v.format(folder) if isinstance(v, str) else v for name, v in fields.items()}
    with pytest.raises(ConfigError, match=message) as error:
        rows_of(**fields)
    assert error.value.field == field


def test_stdlib_splits():
    dataset = data.build(
        {"kind": "text", "path": files.STDLIB}, split="val", batch_size=8, seq_len=512, seed=0, vocab_size=257
    )
    held = [f for f in files.find(files.STDLIB, "path") if holdout.held_out(f.key, 0.05)]
    contents = [Path(file.path).read_bytes() for file in held]
    assert len(dataset.held_out_bytes()) == sum(map(len, contents))
    text_ = dataset.held_out_bytes()
    assert all(content in text_ for content in contents)


def test_one_file_is_data(tmp_path):
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    for path in ("a.txt", "b.txt.gz"):
        [held] = documents_of(path=f"{tmp_path}/{path}", holdout=0.05)
        source, rows = rows_of(path=f"{tmp_path}/{path}", holdout=0.05)
        assert b"".join(line.encode() for line in lines).endswith(held)
        assert (rows["tokens"] == DOC).sum() == 1
        assert 0.03 < len(held) / sum(map(len, lines)) < 0.06 and held.startswith(b"line ")
        assert source.num_tokens == sum(map(len, lines)) - len(held) + 1


def test_twenty_files_always_give_one_to_validate_on(tmp_path):
    for group in range(12):  # a third of such groups have none below the fraction
        (tmp_path / f"{group}").mkdir()
        for i in range(20):
            (tmp_path / f"{group}" / f"{group}-{i}.txt").write_text(f"{i}")
        for fraction in (1e-6, 0.05):
            held = documents_of(path=f"{tmp_path}/{group}/*.txt", holdout=fraction)
            source, _ = rows_of(path=f"{tmp_path}/{group}/*.txt", holdout=fraction)
            assert len(held) >= 1 and len(held) + len(source.documents.length_N) == 20
