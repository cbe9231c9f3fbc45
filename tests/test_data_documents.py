"""Every document of every format once, by name and by content; what is no text is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hybridlm.data import documents, files
from hybridlm.errors import ConfigError


def read(path, text_field="text"):
    return list(documents.read(files.File(path.name, str(path)), text_field, "--input"))


TEXTS = ["one\n", "", "zwölf ☃", "four\x00"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\r\nbytes as they are")
    assert read(tmp_path / "a.py") == [("a.py", b"\xff\r\nbytes as they are", 1.0)]


def zstd(content, codec="zstd"):
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, codec) as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".ZST": zstd,
    ".lz4": lambda content: zstd(content, "lz4"),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.JsonLines", "a.json"])
def test_records_have_a_document_a_line(tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    content = "\n\n".join(json.dumps({"id": 1, "body": text}) for text in [*TEXTS, None]).encode()
    path.write_bytes(COMPRESS[suffix](content))
    found = read(path, "body")
    assert [document.key for document in found] == [f"{path.name}#{line}" for line in (1, 3, 5, 7, 9)]
    assert [document.text for document in found] == [*[text.encode() for text in TEXTS], None]
    parts = [document.part for document in found]
    assert parts == sorted(parts) and 0 < parts[0] <= parts[-1] == 1.0


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_text_whatever_it_is_called(tmp_path, suffix):
    text = "line ☃\n" * 50_000  # more than the sample that tells what a file is
    for name in (f"a.txt{suffix}", "README"):
        (tmp_path / name).write_bytes(COMPRESS[suffix](text.encode()))
        [document] = read(tmp_path / name)
        assert document.text.decode() == text
    twice = COMPRESS[suffix](b"one ") + COMPRESS[suffix](
        b"two"
    )  # as two files in a row, which all of them allow
    (tmp_path / f"b.txt{suffix}").write_bytes(twice)
    assert read(tmp_path / f"b.txt{suffix}")[0].text == b"one two"


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.pq", "a.parq", "a.txt"])
def test_parquet_is_known_by_its_content(tmp_path, name):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    assert [document.text.decode() for document in read(tmp_path / name)] == TEXTS


def test_parquet_has_a_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": range(5), "text": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    found = read(path)
    assert [key for key, _, _ in found] == [f"a.parquet#{row}" for row in range(1, 6)]
    assert [text for _, text, _ in found] == [*[text.encode() for text in TEXTS], None]
    assert np.allclose([part for _, _, part in found], [0.2, 0.4, 0.6, 0.8, 1.0])


def archive():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.txt", "text")
    return out.getvalue()


def tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def numpy_file():
    out = io.BytesIO()
    np.save(out, np.arange(9))
    return out.getvalue()


LINES = b'{"text": "x"}\n' * 999
SQUEEZED = gzip.compress(LINES, mtime=0)
FLIPPED = SQUEEZED[:30] + bytes([SQUEEZED[30] ^ 0x55]) + SQUEEZED[31:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl:2'.*is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"has no text in 'text'. Its fields: body"),
        ("a.jsonl", b'{"text": 3}', r"has no text in 'text'. It holds int"),
        ("a.jsonl", b"[1, 2]", "has no text in 'text'"),
        ("a.jsonl.gz", b"not gzip", "it is not gzip, as its name says"),
        ("a.jsonl.gz", SQUEEZED[:-20], "cannot be read"),
        ("a.jsonl.gz", FLIPPED, "cannot be read"),
        ("a.jsonl.zst", zstd(LINES)[:-5], "cannot be read"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-5], "cannot be read"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-5], "cannot be read"),
        ("a.parquet", b"not parquet", "it is not Parquet, as its name says"),
        ("a.parquet", b"PAR1 not parquet", "cannot be read"),
        ("a.txt.gz", b"", "it is not gzip, as its name says"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested more than 100 deep"),
        ("a.jsonl", b'{"y": 1}', "has no text in 'text'. Its fields: y"),
        ("a.jsonl", b'{"y\\u001b[31m": 1}', r"Its fields: y\\x1b"),
        ("a.txt", archive(), "it is a zip archive"),
        ("a.docx", archive(), "it is a zip archive"),
        ("a.tar", tar(), "it is a tar archive"),
        ("a.tgz", gzip.compress(tar(), mtime=0), "inside of gzip it is a tar archive"),
        (
            "a.txt.gz",
            gzip.compress(gzip.compress(b"x", mtime=0), mtime=0),
            "inside of gzip it is gzip once more",
        ),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "inside of gzip it is Parquet"),
        ("A.NPY", numpy_file(), "it is a NumPy array"),
        ("tokens", np.arange(5000, dtype="<u2").tobytes(), "are control characters"),
        ("train.bin", b"looks like text", "a .bin file is none of these"),
        ("a.pdf", b"%PDF-1.4", "it is PDF"),
        ("a", np.random.default_rng(0).bytes(5000), "are control characters"),
        ("a.txt", "utf-16 ☃".encode("utf-16"), "it is UTF-16"),
        ("a.json", b'{\n "text": "x"\n}', "it is one JSON value"),
        ("a.json", b'[{"text": "x"}]', "it is one JSON value"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / name)
    assert error.value.field == "--input" and "\n" not in str(error.value)


@pytest.mark.parametrize("at", range(0, len(SQUEEZED), 3))
def test_a_flipped_byte_of_gzip_is_one_line(tmp_path, at):
    (tmp_path / "a.jsonl.gz").write_bytes(SQUEEZED[:at] + bytes([SQUEEZED[at] ^ 0xFF]) + SQUEEZED[at + 1 :])
    try:
        found = read(tmp_path / "a.jsonl.gz")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert [document.text for document in found] == [b"x"] * 999  # in a part of no account, as the time


def test_stray_bytes_do_not_make_a_text_another_thing(tmp_path):
    for content in (b"\xff\xfe broken \xc3", b"a\x00b", b"\x1b[31mred\x1b[0m\r\n\x0c", b"", "☃".encode()):
        (tmp_path / "a.txt").write_bytes(content)
        assert read(tmp_path / "a.txt")[0].text == content


def test_a_line_or_a_text_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD", 1000)
    monkeypatch.setattr(documents, "MAX_TEXT", 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 10_000_000))
    with pytest.raises(ConfigError, match=r"a.jsonl.gz:1'.*more than 1,000 bytes"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    with pytest.raises(ConfigError, match="more than 5,000 bytes as one text"):
        read(tmp_path / "a.txt.gz")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="is a pipe, not a file"):
        read(tmp_path / "a.txt")


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path):
    column = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet:2'.*is not UTF-8|cannot be read"):
        read(tmp_path / "a.parquet")


def test_parquet_column_must_be_there_and_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'text'\. Its columns: id"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no text in 'id'\. It holds int64"):
        read(tmp_path / "a.parquet", "id")
