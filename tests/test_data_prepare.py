"""What prepare writes, shards reads back: every document once, under its split, in every format."""

import errno
import gzip
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybridlm.data import holdout, partial, shards
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
    source = shards.Config(str(path)).open(View(split, 32, 0, 1 << 16))
    d, tokens = source.documents, source.tokenizer
    texts = []
    for shard, start, length in zip(d.shard_N, d.start_N, d.length_N, strict=True):
        ids = d.read(shard, start, start + length)
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
        ({"inputs": "short", "holdout": 0.1}, "--holdout", "cannot cut the only text"),
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
    assert error.value.field == field
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, corpus, monkeypatch):
    def full(self, tokens, text_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.Writer, "add", full)
    with pytest.raises(ConfigError, match=r"No space left on device\. Nothing was kept"):
        prepare(corpus["txt"][0], str(tmp_path / "out"), "bytes")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, corpus, monkeypatch):
    def interrupt(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_module.Tokenizer, "documents", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus["txt"][0], str(tmp_path / "out"), "bytes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.5, 1 - 1e-6])
def test_a_holdout_always_leaves_both_splits_something(tmp_path, bpe, kind, fraction):
    for number in (2, 20):
        for i in range(number):
            (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
        out = tmp_path / f"out{number}"
        index = prepare(f"{tmp_path}/*.txt", str(out), bpe if kind == "bpe" else "bytes", holdout=fraction)
        names = [f"{i:02}.txt" for i in range(number)]
        held_N = holdout.choose(names, fraction)  # the rule of data kind "text"
        for split in ("train", "val"):
            texts, source = read_back(out, split)
            wanted = [f"text {i}" for i in range(number) if held_N[i] == (split == "val")]
            assert sorted(texts) == sorted(wanted)
            assert index["splits"][split]["text_bytes"] == sum(map(len, wanted))
            for check in source.checks:
                check()


def test_a_single_document_is_cut(tmp_path):
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").touch()
    index = prepare(f"{tmp_path}/*.txt", str(tmp_path / "out"), "bytes", holdout=0.1)
    [[train], _], [[val], _] = (read_back(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text and train.endswith("\n") and 0.08 < len(val) / len(text) < 0.11
    assert index["empty_documents"] == 1
    index = prepare(f"{tmp_path}/*.txt", str(tmp_path / "whole"), "bytes")
    assert read_back(tmp_path / "whole", "train")[0] == [text]


def test_held_out_files_can_be_named(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    prepare(f"{tmp_path}/*.txt", str(tmp_path / "out"), "bytes", val_inputs=f"{tmp_path}/[45].txt")
    assert read_back(tmp_path / "out", "train")[0] == [f"text {i}" for i in range(4)]
    assert read_back(tmp_path / "out", "val")[0] == ["text 4", "text 5"]
    with pytest.raises(ConfigError, match="holds out every file"):
        prepare(f"{tmp_path}/*.txt", str(tmp_path / "o"), "bytes", val_inputs=f"{tmp_path}/*.txt")
    (tmp_path / "empty.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(ConfigError, match=r"--val_input = .*gives no tokens to hold out"):
        prepare(f"{tmp_path}/*.txt", str(tmp_path / "o"), "bytes", val_inputs=f"{tmp_path}/empty.jsonl")


def test_null_texts_are_counted_in_every_format(tmp_path, capsys):
    texts = ["a", None, "b", "", None]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.pq")
    for name in ("a.jsonl", "a.pq"):
        out = tmp_path / f"{name}.out"
        flags = ["--input", str(tmp_path / name), "--output", str(out), "--tokenizer", "bytes"]
        assert main(flags) == 0
        printed = capsys.readouterr().out
        assert "left out: 3 documents without tokens, of which 2 with null for a text" in printed
        assert "tokens/s" in printed and "nothing is held out; a run that validates on them" in printed
        index = json.loads((out / "index.json").read_text())
        assert (index["empty_documents"], index["null_documents"]) == (3, 2)
        assert read_back(out, "train")[0] == ["a", "b"]


def test_a_tokenizer_can_be_trained(tmp_path, corpus):
    contents = []
    for name in ("one", "two"):
        index = prepare(corpus["txt"][0], str(tmp_path / name), train_bpe=290, holdout=0.2)
        assert index["vocab_size"] == 290 and index["doc_id"] == 0
        contents.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert contents[0] == contents[1]
    texts = [text for split in ("train", "val") for text in read_back(tmp_path / "one", split)[0]]
    assert sorted(texts) == sorted(TEXTS)
    tokens = tokenizer_module.load(str(tmp_path / "one" / "tokenizer.json"))
    # Merges come from the training documents alone, and shorten the text; any text is read back.
    assert len(tokens.encode(TEXTS[6])) < 0.8 * len(TEXTS[6].encode())
    assert tokens.decode(tokens.encode("жаба <doc>\x00")) == "жаба <doc>\x00"


def test_damage_in_the_middle_of_training_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "some words " * 99 + '"}\nnot json')
    with pytest.raises(ConfigError, match=r"a.jsonl:2'.*is not JSON"):
        prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), train_bpe=258)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_text_that_the_tokenizer_refuses_is_one_line(tmp_path, corpus):
    tokenizers.Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"cannot encode 'document 0: '.*Missing \[UNK\]") as error:
        prepare(corpus["txt"][0], str(tmp_path / "out"), str(tmp_path / "t.json"))
    assert error.value.field == "--tokenizer" and os.listdir(tmp_path) == ["t.json"]


KILLED = """
import os, sys
from hybridlm.data import prepare, tokenizer
tokenizer.Tokenizer.documents = lambda self, texts: os.kill(os.getpid(), 9)
prepare.main(sys.argv[1:])
"""


def test_the_same_command_goes_on_after_a_kill(tmp_path, corpus):
    flags = ["--input", corpus["txt"][0], "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", KILLED, *flags], check=False, env=environment)
    assert done.returncode == -9 and os.listdir(tmp_path) == ["out.partial"]
    assert main(flags) == 0 and os.listdir(tmp_path) == ["out"]


def test_what_another_prepare_writes_is_left_alone(tmp_path, corpus):
    with partial.folder(tmp_path / "out", "--output") as folder:
        (folder / "index.json").write_text("{}")
        with pytest.raises(ConfigError, match=r"unfinished out.partial"):
            prepare(corpus["txt"][0], str(tmp_path / "out"), "bytes")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["index.json"]
    theirs = tmp_path / "next.partial"
    theirs.mkdir()
    for name in ("lock", "thesis.tex"):  # a folder that only looks like ours
        (theirs / name).touch()
    with pytest.raises(ConfigError, match=r"unfinished next.partial"):
        prepare(corpus["txt"][0], str(tmp_path / "next"), "bytes")
    assert sorted(os.listdir(theirs)) == ["lock", "thesis.tex"]


LIMITED = """
import resource, signal, sys
from hybridlm.data import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(prepare.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("descriptors", "said"), [(64, "--output"), (6, "Too many open files")])
def test_limits_of_the_system_are_one_line(tmp_path, corpus, descriptors, said):
    """A file that may not grow stands for a full disk."""
    flags = ["--input", corpus["a.jsonl"][0], "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", LIMITED, str(descriptors), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert "--output" in done.stderr or "--input" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_commands_of_the_docs(tmp_path, monkeypatch, corpus):
    page = Path(__file__).parent.parent / "docs" / "data.md"
    block = page.read_text().split("```bash\n")[1].split("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    for name in ("corpus/deep", "data"):
        Path(name).mkdir(parents=True)
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    with pyarrow.CompressedOutputStream("corpus/a.jsonl.zst", "zstd") as out:
        out.write(lines)
    for name in ("deep/a", "last"):
        Path(f"corpus/{name}.txt").write_text("".join(TEXTS))
    for line in block:
        command = shlex.split(line)
        assert command[:3] == ["python", "-m", "hybridlm.data.prepare"]
        if "--dataset" not in command or importlib.util.find_spec("datasets"):
            if "--dataset" in command:
                import datasets

                datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk("corpus/saved")
            assert main(command[3:]) == 0
            assert read_back(tmp_path / command[command.index("--output") + 1], "val")[0]


@pytest.mark.parametrize("flag", ["--dataset_config", "--split", "--val_split"])
def test_flags_of_a_dataset_without_one(capsys, flag):
    assert main(["--input", "a.txt", "--output", "out", "--tokenizer", "bytes", flag, "train"]) == 2
    assert f"{flag} = 'train': is of a dataset" in capsys.readouterr().err


def test_a_split_that_is_trained_on_is_not_held_out(capsys):
    assert main(["--dataset", "any", "--val_split", "train", "--output", "out", "--tokenizer", "bytes"]) == 2
    assert "--val_split = 'train': is the split to train on" in capsys.readouterr().err
