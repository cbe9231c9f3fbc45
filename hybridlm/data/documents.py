"""Documents of a file, one after the other: a text file is one; JSON lines and Parquet have one a record."""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow.parquet

from hybridlm import untrusted
from hybridlm.data import formats
from hybridlm.data.files import File
from hybridlm.errors import ConfigError

MAX_TEXT = 1 << 30  # bytes of a text file, decompressed
MAX_RECORD = 1 << 28  # bytes of a line: 3 MB of gzip can hold one of 3 GB


class Document(NamedTuple):
    """key: names the file and the place in it.  text: None for a record whose text is null.
    part: of the file read so far.
    """

    key: str
    text: bytes | None
    part: float


def record(key: str, number: int, text: str | None, part: float) -> Document:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8: "?" stands for it."""
    return Document(f"{key}#{number}", None if text is None else text.encode(errors="replace"), part)


class Part(NamedTuple):
    """Documents from one place. size: bytes of the file, 0 where unknown.

    split: "train", "val", or "" for those that the holdout rule divides.
    """

    size: int
    split: str
    read: Callable[[], Iterator[Document]]


def read(file: File, text_field: str, field: str) -> Iterator[Document]:
    """The documents of ``file``, streamed; records have their text in ``text_field``.

    A record whose text is null comes as None; one without the field is refused, as is one whose text is no
    string. Raises ConfigError, naming file and line, for those and for what `formats` cannot read.
    """
    kind, codec = formats.identify(file.path, field)
    with formats.readable(file.path, field):
        if kind == "parquet":
            yield from _parquet(file, text_field, field)
        elif kind == "records":
            yield from _records(file, codec, text_field, field)
        else:
            with formats.stream(file.path, codec) as (_, opened):
                text = opened.read(MAX_TEXT + 1)
            if len(text) > MAX_TEXT:
                fix = "Cut it into several files, or write one record a document (.jsonl)."
                raise ConfigError(field, file.path, f"holds more than {MAX_TEXT:,} bytes as one text", fix)
            yield Document(file.key, text, 1.0)


def whole(file: File, field: str, fix: str = "Give a text file.") -> bytes:
    """The text of a ``file`` that is one, decompressed; ConfigError, with ``fix``, for one of records."""
    if formats.identify(file.path, field).kind != "text":
        raise ConfigError(field, file.path, "holds records, not one text", fix)
    [document] = read(file, "", field)
    return document.text or b""


def _records(file: File, codec: str, text_field: str, field: str) -> Iterator[Document]:
    size = max(untrusted.regular(file.path, field).st_size, 1)
    number = 0
    with formats.stream(file.path, codec) as (raw, lines):
        while line := lines.readline(MAX_RECORD + 1):
            number += 1
            where = f"{file.path}:{number}"
            if len(line) > MAX_RECORD:
                raise ConfigError(field, where, f"is a line of more than {MAX_RECORD:,} bytes")
            if not line.strip():
                continue
            text = _text(line, text_field, field, where)
            yield record(file.key, number, text, min(raw.tell() / size, 1.0))


def _text(line: bytes, text_field: str, field: str, where: str) -> str | None:
    try:
        if line.count(b"[") + line.count(b"{") > untrusted.MAX_DEPTH:
            untrusted.check_depth(line.decode("utf-8-sig"))
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(field, where, "is not JSON", f"{error}.") from error
    if isinstance(record, dict) and text_field in record:
        text = record[text_field]
        if isinstance(text, str | None):
            return text
        raise ConfigError(field, where, f"has no text in {text_field!r}", f"It holds {type(text).__name__}.")
    names = ", ".join(list(record)[:20]) if isinstance(record, dict) else "none"
    said = untrusted.terminal(f"Its fields: {names}.")
    raise ConfigError(field, where, f"has no text in {text_field!r}", said)


def _parquet(file: File, text_field: str, field: str) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(file.path) as table:
        if text_field not in table.schema_arrow.names:
            names = untrusted.terminal(", ".join(table.schema_arrow.names[:20]))
            raise ConfigError(field, file.path, f"has no column {text_field!r}", f"Its columns: {names}.")
        number, total = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0):
                number += 1
                where = f"{file.path}:{number}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise ConfigError(field, where, "is not UTF-8", f"{error}.") from error
                if not isinstance(text, str | None):
                    said = f"It holds {value.type}."
                    raise ConfigError(field, where, f"has no text in {text_field!r}", said)
                yield record(file.key, number, text, number / total)
