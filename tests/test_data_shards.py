import json

import numpy as np
import pytest

from hybridlm.data import shards, tokenizer
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

DOCUMENTS = [np.array([256, *range(n)], np.uint16) for n in (3, 10, 1, 30, 2)]


@pytest.fixture
def directory(tmp_path):
    writer = shards.Writer(tmp_path, "train", np.dtype("<u2"), 15)
    for document in DOCUMENTS:
        writer.add(document, len(document) - 1)
    empty = shards.Writer(tmp_path, "val", np.dtype("<u2"), 15).finish()
    shards.write_index(tmp_path, tokenizer.load("bytes"), {"train": writer.finish(), "val": empty})
    return tmp_path


def open_split(directory, split="train"):
    return shards.open_source(shards.Config(str(directory)), View(split, 8, 0, 257))


def test_files_are_as_documented(directory):
    index = json.loads((directory / "index.json").read_text())
    names = {"index.json"} | {f"train-0000{i}{end}" for i in range(3) for end in (".tokens", ".offsets")}
    assert {path.name for path in directory.iterdir()} == names
    first = np.fromfile(directory / "train-00000.tokens", "<u2").tolist()
    assert first == [token for document in DOCUMENTS[:2] for token in document]  # 4 + 11 tokens end a shard
    assert np.fromfile(directory / "train-00000.offsets", "<u8").tolist() == [0, 4, 15]
    assert np.fromfile(directory / "train-00001.offsets", "<u8").tolist() == [0, 2, 33]
    assert index["splits"]["train"]["documents"] == 5 and index["splits"]["train"]["tokens"] == 51
    assert index["splits"]["val"] == {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}


def test_documents_come_back(directory):
    d = open_split(directory).documents
    read = [d.arrays[s][a : a + n].tolist() for s, a, n in zip(d.shard_N, d.start_N, d.length_N, strict=True)]
    assert read == [document.tolist() for document in DOCUMENTS]
    assert type(d.arrays[0]) is np.ndarray and not d.arrays[0].flags.writeable


def damage_index(directory, change):
    index = json.loads((directory / "index.json").read_text())
    change(index)
    (directory / "index.json").write_text(json.dumps(index))


DAMAGES = {
    "is no directory": lambda d: [path.unlink() for path in d.iterdir()] and d.rmdir(),
    "has no index.json": lambda d: (d / "index.json").unlink(),
    "index.json cannot be read": lambda d: (d / "index.json").write_text("{"),
    "has format 'other'": lambda d: damage_index(d, lambda index: index.update(format="other")),
    "train-00001.tokens is missing": lambda d: (d / "train-00001.tokens").unlink(),
    "train-00001.tokens has 71 bytes, the index says 66": lambda d: (d / "train-00001.tokens").write_bytes(
        b"x" * 71
    ),
    "train-00000.offsets has 8 bytes": lambda d: (d / "train-00000.offsets").write_bytes(b"x" * 8),
    "offsets do not increase": lambda d: (d / "train-00000.offsets").write_bytes(
        np.array([0, 14, 15], "<u8").tobytes()
    ),
    "not the tokenizer it was written with": lambda d: damage_index(d, lambda index: index.update(doc_id=0)),
    "tokenizer.json": lambda d: damage_index(
        d, lambda index: index["tokenizer"].update(name="tokenizer.json")
    ),
    "has no documents in its train split": lambda d: damage_index(
        d, lambda index: index["splits"].pop("train")
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_directory_is_refused(directory, message):
    DAMAGES[message](directory)
    with pytest.raises(ConfigError, match=message) as error:
        open_split(directory)
    assert error.value.field == "path" and error.value.value == str(directory)


def test_no_held_out_documents(directory):
    with pytest.raises(ConfigError, match=r"no documents in its val split\. Write it again with --holdout"):
        open_split(directory, "val")
