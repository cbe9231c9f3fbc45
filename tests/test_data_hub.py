"""Datasets of the `datasets` library, from folders of this machine; names on the hub go the same way."""

import json
import re
import sys
import types

import pytest

from hybridlm.data import hub
from hybridlm.data.prepare import main, prepare
from hybridlm.data.shards import Config
from hybridlm.data.source import View
from hybridlm.errors import ConfigError

TEXTS = [f"text {i} ☃" for i in range(30)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("datasets", reason="needs the eval extra")


def texts_of(folder, split):
    source = Config(str(folder)).open(View(split, 16, 0, 257))
    d = source.documents
    places = zip(d.shard_N, d.start_N, d.length_N, strict=True)
    return [source.tokenizer.decode(d.read(s, a, a + n)) for s, a, n in places]


def test_a_folder_of_data_files(datasets, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for split, texts in (("train", [*TEXTS, None]), ("test", ["held"])):
        lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in texts)
        (tmp_path / "mine" / f"{split}.jsonl").write_text(lines)
    flags = ["--dataset", str(tmp_path / "mine"), "--val_split", "test", "--text_field", "body"]
    assert main([*flags, "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert texts_of(tmp_path / "out", "train") == TEXTS and texts_of(tmp_path / "out", "val") == ["held"]
    assert "of which 1 with null" in capsys.readouterr().out


def test_a_folder_that_was_saved(datasets, tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "several"))
    for name in ("one", "several"):
        dataset = hub.Dataset(str(tmp_path / name))
        prepare("", str(tmp_path / f"{name}.out"), "bytes", dataset=dataset, holdout=0.2)
        splits = [texts_of(tmp_path / f"{name}.out", split) for split in ("train", "val")]
        assert sorted(splits[0] + splits[1]) == sorted(TEXTS) and splits[1]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"name": "gone"}, "--dataset", "cannot be loaded"),
        ({"split": "tset"}, "--dataset", "cannot be loaded"),
        ({"text_field": "body"}, "--text_field", "is no column of .* It has text, id"),
        ({"text_field": "id"}, "--text_field", "is no text in mine/train#1.*It holds int"),
        ({"val_inputs": "x"}, "--val_input", "goes with --input"),
        ({"inputs": "x"}, "--input", "or else --dataset"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(datasets, tmp_path, change, field, message):
    datasets.Dataset.from_dict({"text": TEXTS, "id": range(30)}).save_to_disk(str(tmp_path / "mine"))
    before = sorted(path.name for path in tmp_path.iterdir())
    dataset = hub.Dataset(str(tmp_path / change.get("name", "mine")), split=change.get("split", "train"))
    options = {name: change[name] for name in ("text_field", "val_inputs") if name in change}
    if change.get("split"):
        datasets.DatasetDict(train=datasets.load_from_disk(dataset.name)).save_to_disk(str(tmp_path / "dict"))
        before.append("dict")
        dataset = hub.Dataset(str(tmp_path / "dict"), split=change["split"])
    with pytest.raises(ConfigError, match=message) as error:
        prepare(change.get("inputs", ""), str(tmp_path / "out"), "bytes", dataset=dataset, **options)
    assert error.value.field == field and "\n" not in str(error.value)
    assert not {path.name for path in tmp_path.iterdir()} - {*before, "cache"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_split=test"], "--val_split = 'test': names no part of .* without splits"),
        (["--split=test"], "--split = 'test': names no part of"),
        (["--dataset_config=en"], "--dataset_config = 'en': has no meaning"),
        (["--val_split=train"], "--val_split = 'train': is the split to train on"),
        ([], ""),
    ],
)
def test_a_split_of_what_has_none_is_refused(tmp_path, monkeypatch, capsys, flags, message):
    """What was saved as one set was read whole whatever was asked for: held out and trained on alike."""

    class Rows(list):
        column_names = ("text",)

    library = types.SimpleNamespace(
        DatasetDict=dict, load_from_disk=lambda path: Rows({"text": text} for text in TEXTS)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "state.json").touch()
    made = ["--dataset", str(tmp_path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*made, *flags]) == (2 if message else 0)
    assert re.search(message, capsys.readouterr().err) and (tmp_path / "out").exists() == (not message)


def test_without_the_library_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    flags = ["--dataset", "some/name", "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(flags) == 2
    assert "needs the package datasets. pip install 'hybridlm[eval]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--dataset" in capsys.readouterr().out
