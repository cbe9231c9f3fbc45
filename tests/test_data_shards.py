import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hybridlm.data import shards, tokenizer
from hybridlm.data.source import View
from hybridlm.errors import ConfigError, RunError

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
    return shards.Config(str(directory)).open(View(split, 8, 0, 257))


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
    read = [d.read(s, a, a + n).tolist() for s, a, n in zip(d.shard_N, d.start_N, d.length_N, strict=True)]
    assert read == [document.tolist() for document in DOCUMENTS]


def test_a_shard_cut_in_place_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    """Of a mapped one, what lay in the pages that were cut off would end the process (SIGBUS)."""
    writer = shards.Writer(tmp_path, "train", np.dtype("<u2"), 1 << 20)
    writer.add(np.array([256, *[1] * 20_000], np.uint16), 20_000)
    shards.write_index(tmp_path, tokenizer.load("bytes"), {"train": writer.finish()})
    documents, path = open_split(tmp_path).documents, tmp_path / "train-00000.tokens"
    assert documents.read(0, 19_000, 20_001).tolist() == [1] * 1_001
    before = os.stat(path)
    os.truncate(path, 100)
    said = r"train-00000.tokens: the shard has changed to 100 bytes while"
    with pytest.raises(RunError, match=said):
        documents.read(0, 19_000, 20_001)
    monkeypatch.setattr(os, "stat", lambda path: before)  # cut between the look at it and the reading
    with pytest.raises(RunError, match=said):
        documents.read(0, 19_000, 20_001)


def damage_index(directory, change):
    index = json.loads((directory / "index.json").read_text())
    change(index)
    index["sha256"] = shards.index_sum(index)  # damage beyond what the sum finds
    (directory / "index.json").write_text(json.dumps(index))


def as_written_before(directory):
    """The index as older versions wrote it: no sums of the offsets and of itself."""

    def change(index):
        index["format"] = shards.UNSEALED
        for shard in index["splits"]["train"]["shards"]:
            shard.pop("offsets_sha256")

    damage_index(directory, change)


DAMAGES = {
    "is no directory": lambda d: [path.unlink() for path in d.iterdir()] and d.rmdir(),
    "has no index.json": lambda d: (d / "index.json").unlink(),
    "index.json is not the JSON": lambda d: (d / "index.json").write_text("{"),
    "nested more than 100 deep": lambda d: (d / "index.json").write_text('{"a": ' + "[" * 5000),
    "index.json: SHA-256|SHA-256 of the rest": lambda d: (d / "index.json").write_text(
        (d / "index.json").read_text().replace('"documents": 5', '"documents": 4')
    ),
    "documents of train are not those": lambda d: damage_index(
        d, lambda index: index["splits"]["train"]["shards"].pop()
    ),
    r"shards\[1\].sha256 is missing": lambda d: damage_index(
        d, lambda index: index["splits"]["train"]["shards"][1].pop("sha256")
    ),
    "train-00001 has no offsets_sha256": lambda d: damage_index(
        d, lambda index: index["splits"]["train"]["shards"][1].pop("offsets_sha256")
    ),
    "a shard has the name '../x'": lambda d: damage_index(
        d, lambda index: index["splits"]["train"]["shards"][1].update(name="../x")
    ),
    "its tokenizer is '../t.json'": lambda d: damage_index(
        d, lambda index: index["tokenizer"].update(name="../t.json")
    ),
    "dtype must be uint16 or uint32": lambda d: damage_index(d, lambda index: index.update(dtype="object")),
    "train-00001.offsets: its SHA-256": lambda d: (d / "train-00001.offsets").write_bytes(
        np.array([0, 3, 33], "<u8").tobytes()
    ),
    "has format 'other'": lambda d: damage_index(d, lambda index: index.update(format="other")),
    "train-00001.tokens is missing": lambda d: (d / "train-00001.tokens").unlink(),
    "train-00001.tokens has 71 bytes, the index says 66": lambda d: (d / "train-00001.tokens").write_bytes(
        b"x" * 71
    ),
    "train-00000.offsets has 8 bytes": lambda d: (d / "train-00000.offsets").write_bytes(b"x" * 8),
    "offsets do not increase": lambda d: (
        (d / "train-00000.offsets").write_bytes(np.array([0, 14, 15], "<u8").tobytes()),
        as_written_before(d),
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


def test_offsets_that_an_older_version_wrote_are_held_against_the_separators(directory):
    as_written_before(directory)
    for check in open_split(directory).checks:
        check()
    offsets = np.array([0, 3, 33], "<u8")  # the second document would begin a token too late
    (directory / "train-00001.offsets").write_bytes(offsets.tobytes())
    source = open_split(directory)
    with pytest.raises(RunError, match=r"train-00001.offsets: the shard is damaged.*not where the documents"):
        for check in source.checks:
            check()


def test_any_flipped_bit_of_any_file_is_found(directory):
    """Before the first checkpoint: at the opening, or by a check."""
    files = sorted(directory.iterdir())
    sound = open_split(directory).rows(np.arange(7))["tokens"].tolist()
    for path in files:
        content = path.read_bytes()
        for at in range(0, len(content), 7):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            try:
                source = open_split(directory)
                for check in source.checks:
                    check()
            except (ConfigError, RunError) as error:
                assert "\n" not in str(error)
            else:
                # White space of the index, say: then the rows are the same.
                assert path.name == "index.json" and source.rows(np.arange(7))["tokens"].tolist() == sound
        path.write_bytes(content)


def test_a_document_can_be_taken_out_again(tmp_path):
    for number, document in enumerate(DOCUMENTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        writers = {split: shards.Writer(folder, split, np.dtype("<u2"), 15) for split in ("train", "val")}
        for one in DOCUMENTS:
            writers["train"].add(one, len(one) - 1)
        taken = writers["train"].take(number, len(document) - 1)
        assert taken.tolist() == document.tolist()
        writers["val"].add(taken, len(document) - 1)
        splits = {split: writer.finish() for split, writer in writers.items()}
        shards.write_index(folder, tokenizer.load("bytes"), splits)
        left = [one.tolist() for one in DOCUMENTS if one is not document]
        for split, expected in (("train", left), ("val", [document.tolist()])):
            source = open_split(folder, split)
            for check in source.checks:
                check()
            d = source.documents
            places = zip(d.shard_N, d.start_N, d.length_N, strict=True)
            assert [d.read(s, a, a + n).tolist() for s, a, n in places] == expected
            assert splits[split]["text_bytes"] == sum(len(one) - 1 for one in expected)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from hybridlm.data import shards
from hybridlm.data.source import View
source = shards.Config(sys.argv[1]).open(View("train", 8, 0, 257))
assert len(source.checks) == 200
for check in source.checks:
    check()
print(source.rows(np.arange(source.num_rows))["tokens"].astype(np.int64).sum())
"""


def test_more_shards_than_descriptors(tmp_path):
    writer = shards.Writer(tmp_path, "train", np.dtype("<u2"), 1)
    for i in range(200):
        writer.add(np.array([256, i], np.uint16), 1)
    shards.write_index(tmp_path, tokenizer.load("bytes"), {"train": writer.finish()})
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 200 * 256 + sum(range(200))
