import gzip
import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hybridlm.data import files
from hybridlm.errors import ConfigError


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def keys(patterns):
    return [file.key for file in files.find(patterns, "path")]


def test_globs_give_keys_below_their_fixed_part(tree, monkeypatch):
    assert keys(f"{tree}/**/*.txt") == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert keys(f"{tree}/sub/*.txt") == ["b.txt"]
    assert keys(f"{tree}/sub/*.txt, {tree}/a.txt,{tree}/**/*.txt") == ["b.txt", "a.txt", "sub/deep/c.txt"]
    monkeypatch.chdir(tree)
    assert keys("**/*.txt") == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert keys("sub/../a.txt") == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.txt", "does not exist"),
        ("*.none", "matches no file"),
        ("sub", "is a directory"),
        ("", "must be a path"),
    ],
)
def test_nothing_found_is_refused(tree, pattern, message):
    with pytest.raises(ConfigError, match=message) as error:
        files.find(f"{tree}/{pattern}" if pattern else "", "val_path")
    assert error.value.field == "val_path"


def test_stdlib_is_python_text_without_tests():
    found = files.find(files.STDLIB, "path")
    names = [file.key for file in found]
    assert len(names) > 300 and names == sorted(set(names))
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(Path(file.path) == root / file.key for file in found)


def test_holding_out_depends_on_the_key_alone():
    names = [f"dir/{i}.txt" for i in range(20_000)]
    small, large = ({n for n in names if files.held_out(n, f)} for f in (0.02, 0.3))
    assert small < large  # a larger fraction keeps what a smaller one held out
    assert len(small) == pytest.approx(400, abs=90) and len(large) == pytest.approx(6000, abs=300)
    assert not any(files.held_out(name, 0.0) for name in names)
    # Two machines and two releases must agree on what is held out.
    assert [files.held_out(name, 0.5) for name in names[:8]] == [True, *[False] * 3] * 2


def read(path, text_field="text"):
    return list(files.read(files.File(path.name, str(path)), text_field, "--input"))


TEXTS = ["one\n", "", "zwölf ☃", "four\x00"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\r\nbytes as they are")
    assert read(tmp_path / "a.py") == [("a.py", b"\xff\r\nbytes as they are", 1.0)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_has_a_document_a_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    content = "\n\n".join(json.dumps({"id": 1, "body": text}) for text in TEXTS).encode()
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    documents = read(path, "body")
    assert [key for key, _, _ in documents] == [f"a{suffix}#{line}" for line in (1, 3, 5, 7)]
    assert [text.decode() for _, text, _ in documents] == TEXTS
    parts = [part for _, _, part in documents]
    assert parts == sorted(parts) and 0 < parts[0] <= parts[-1] == 1.0


def test_parquet_has_a_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": range(5), "text": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    documents = read(path)
    assert [key for key, _, _ in documents] == [f"a.parquet#{row}" for row in range(1, 6)]
    assert [text.decode() for _, text, _ in documents] == [*TEXTS, ""]
    assert np.allclose([part for _, _, part in documents], [0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl:2'.*is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"has no text in 'text'. Its fields: body"),
        ("a.jsonl", b'{"text": 3}', "has no text in 'text'"),
        ("a.jsonl", b"[1, 2]", "has no text in 'text'"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], "cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.txt.gz", b"", "must be text, or one of .jsonl"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / name)
    assert error.value.field == "--input"


def test_parquet_column_must_be_there_and_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'text'\. Its columns: id"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no text in 'id'\. It holds int64"):
        read(tmp_path / "a.parquet", "id")
