"""Damaged inputs of `prepare`, shards and tokenizer files: what they held, or one line that says why not.

Each case takes a sound file of one kind, changes bytes, lengths, names or (in JSON) values, and reads it. A
sound outcome is the documents of the sound file, or some that differ where no format could tell (a letter of
a text); shards give their rows, to the bit, or are refused.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hybridlm.data import bpe, documents, files, shards, tokenizer
from hybridlm.data.prepare import prepare
from hybridlm.data.source import View
from tests.fuzz.changes import in_bytes, in_json

TEXTS = [f'text {i}: naïve ☃ [{{ \\ "' * (i % 4 + 1) for i in range(30)]


def inputs() -> dict[str, bytes]:
    """Sound files by name."""
    lines = "\n".join(json.dumps({"text": text, "meta": {"id": [1]}}) for text in [*TEXTS, None]).encode()
    found = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.ndjson.xz": lzma.compress(lines)}
    found |= {"a.json.bz2": bz2.compress(lines), "a.txt": "\n".join(TEXTS).encode()}
    found["a.txt.gz"] = gzip.compress(found["a.txt"])
    for codec, suffix in (("zstd", "zst"), ("lz4", "lz4")):
        out = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(out, codec) as stream:
            stream.write(lines)
        found[f"a.jsonl.{suffix}"] = out.getvalue().to_pybytes()
    for name, options in {"a.parquet": {}, "b.pq": {"compression": "zstd", "row_group_size": 7}}.items():
        out = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), out, **options)
        found[name] = out.getvalue().to_pybytes()
    return found


def tokenizer_files() -> dict[str, Any]:
    """Sound tokenizer files, parsed."""
    with tempfile.TemporaryDirectory() as folder:
        bpe.train((text.encode() for text in TEXTS), 280, Path(folder, "t.json"))
        found = {"byte level": json.loads(Path(folder, "t.json").read_text())}
    pieces = (
        {"<unk>": 0, "▁": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)} | {"te": 258, "▁te": 259}
    )
    llama = tokenizers.Tokenizer(models.BPE(pieces, [("▁", "te")], byte_fallback=True, unk_token="<unk>"))
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = tokenizers.Tokenizer(models.WordLevel({"text": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("t", -1.0), ("te", -1.5)], 0, True))
    unigram.decoder = decoders.Metaspace()
    for name, file in {"llama": llama, "words": words, "unigram": unigram}.items():
        found[name] = json.loads(file.to_str())
    return found


class Cases:
    """The sound files, and a reader for each kind of case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs, self.tokenizers = inputs(), tokenizer_files()
        (folder / "in").mkdir()
        for i, text in enumerate(TEXTS):
            (folder / "in" / f"{i:02}.txt").write_text(text)
        (folder / "t.json").write_text(json.dumps(self.tokenizers["byte level"]))
        for name, tokens in (("bytes", "bytes"), ("bpe", str(folder / "t.json"))):
            prepare(f"{folder}/in/*.txt", str(folder / name), tokens, holdout=0.2, shard_tokens=200)
        self.rows = {name: self.read_shards(folder / name) for name in ("bytes", "bpe")}

    def input(self, chance: random.Random) -> str:
        name = chance.choice(list(self.inputs))
        content = in_bytes(self.inputs[name], chance)
        if chance.random() < 0.1:
            name = chance.choice((name.upper(), "a", "a.txt", "a.parquet", "a.jsonl", "a.gz", "a.json"))
        path = self.folder / name
        path.write_bytes(content)
        try:
            found = list(documents.read(files.File(name, str(path)), "text", "--input"))
            assert all(document.text is None or isinstance(document.text, bytes) for document in found)
            keys = [document.key for document in found]
            assert len(set(keys)) == len(keys) and all(0 <= document.part <= 1 for document in found)
            for document in found:  # no container's bytes
                text = document.text or b""
                assert not text.startswith((b"\x1f\x8b", b"PAR1", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")), text[:9]
            if chance.random() < 0.1:
                out = self.folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                index = prepare(str(path), str(out), str(self.folder / "t.json"), holdout=0.2)
                kept = [document for document in found if document.text]
                splits = index["splits"].values()
                single = len(kept) == 1
                assert sum(split["documents"] for split in splits) == (2 if single else len(kept))
        finally:
            path.unlink()
        return f"{Path(name).suffix.lower() or 'text'} read"

    def shards(self, chance: random.Random) -> str:
        kind = chance.choice(("bytes", "bpe"))
        copied = self.folder / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(self.folder / kind, copied)
        path = chance.choice(sorted(copied.iterdir()))
        content = path.read_bytes()
        if path.suffix in (".offsets", ".tokens") and chance.random() < 0.3:
            return self.resealed(copied, path, chance)
        if path.suffix == ".json" and chance.random() < 0.7:
            value = in_json(json.loads(content), chance)
            if chance.random() < 0.8 and isinstance(value, dict) and "splits" in value:
                value["sha256"] = shards.index_sum(value)  # as if it had been written so
            path.write_text(json.dumps(value))
        elif chance.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(in_bytes(content, chance))
        found = self.read_shards(copied)
        assert all((a == b).all() for a, b in zip(found, self.rows[kind], strict=True)), (
            f"{path.name}: other rows"
        )
        return "shards read"

    def resealed(self, copied: Path, path: Path, chance: random.Random) -> str:
        """Other numbers under sums that fit them: only what can be documents and tokens may be read."""
        dtype = shards.OFFSET if path.suffix == ".offsets" else np.dtype("<u2")
        numbers = np.fromfile(path, dtype)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(numbers))
            near = int(numbers[at]) + chance.choice((-1, 1, 2, 100))
            other = chance.choice((near, 0, int(numbers[-1]), np.iinfo(dtype).max, 1 << 15, 1 << 63))
            numbers[at] = other % (int(np.iinfo(dtype).max) + 1)
        path.write_bytes(numbers.tobytes())
        index = json.loads((copied / "index.json").read_text())
        name = "offsets_sha256" if path.suffix == ".offsets" else "sha256"
        for shard in (shard for split in index["splits"].values() for shard in split["shards"]):
            if shard["name"] == path.stem:
                shard[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        index["sha256"] = shards.index_sum(index)
        (copied / "index.json").write_text(json.dumps(index))
        for array in self.read_shards(copied):
            assert array.min() >= -1 and array.max() < 300, f"{path.name}: {array.min()} to {array.max()}"
        return "resealed shards read"

    def read_shards(self, folder: Path) -> list[np.ndarray]:
        rows = []
        for split in ("train", "val"):
            source = shards.Config(str(folder)).open(View(split, 32, 0, 300))
            for check in source.checks:
                check()
            batch = source.rows(np.arange(source.num_rows))
            rows += [batch[name] for name in sorted(batch)]
        return rows

    def tokenizer(self, chance: random.Random) -> str:
        name = chance.choice(list(self.tokenizers))
        path = self.folder / "fuzzed.json"
        if chance.random() < 0.7:
            path.write_text(json.dumps(in_json(self.tokenizers[name], chance)))
        else:
            path.write_bytes(in_bytes(json.dumps(self.tokenizers[name]).encode(), chance))
        tokens = tokenizer.load(str(path))
        assert 0 <= tokens.doc_id < tokens.vocab_size <= tokenizer.MAX_ID + 1
        assert tokens.pieces is None or len(tokens.pieces) == tokens.vocab_size
        for text, array in zip(
            TEXTS[:5], tokens.documents([text.encode() for text in TEXTS[:5]]), strict=True
        ):
            assert array[0] == tokens.doc_id and array.max() < tokens.vocab_size
            ids = tokens.encode(text)
            assert array[1:].tolist() == ids and isinstance(tokens.decode(ids), str)
            stream = tokens.stream(ids[:2])
            "".join(map(stream.add, ids[2:])) + stream.end()
        return "tokenizer read"


def cases(kind: str, folder: Path) -> Callable[[random.Random], str]:
    case: Callable[[random.Random], str] = getattr(Cases(folder), kind)
    return case
