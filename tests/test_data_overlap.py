"""Held-out text that is trained on is noticed, wherever it lies; what only looks alike is not."""

import pytest

from hybridlm import config as configs
from hybridlm import data, trainer
from hybridlm.data import overlap
from hybridlm.data.prepare import prepare
from tests import tiny

TEXTS = [f"{word} is the word of this text, {word}" * n for n, word in enumerate("abcdefghij", 1)]


@pytest.fixture
def folder(tmp_path):
    """train/ and copy/ of the same texts, other/ of as long ones."""
    for name, texts in (("train", TEXTS), ("copy", TEXTS[::-1]), ("other", [t[::-1] for t in TEXTS])):
        (tmp_path / name).mkdir()
        for n, text in enumerate(texts):
            (tmp_path / name / f"{n}.txt").write_text(text)
    return tmp_path


def warned(given, field="data"):
    sizes = {"batch_size": 1, "seq_len": 16, "seed": 0, "vocab_size": 300}
    train, held = (data.build(given, split=split, **sizes).source for split in ("train", "val"))
    return overlap.warning(train, held, field)


def test_files_copied_under_other_names(folder):
    text = {"kind": "text", "path": f"{folder}/train/*", "val_path": f"{folder}/copy/*"}
    said = "data: of the 10 longest held-out documents 10 are trained on, too (0.txt)"
    assert warned(text).startswith(said)
    assert warned({"kind": "mixture", "components": {"a": text}}, "val.x").startswith("val.x: of the 10")
    assert not warned(text | {"val_path": f"{folder}/other/*"})
    assert not warned({"kind": "text", "path": f"{folder}/train/*", "holdout": 0.4})
    assert not warned({"kind": "mqar", "num_pairs": 2})


def test_shards_that_were_written_of_one_text_twice(folder):
    for name in ("copy", "other"):
        prepare(f"{folder}/train/*", f"{folder}/{name}-shards", "bytes", val_inputs=f"{folder}/{name}/*")
    assert "10 are trained on, too (val-00000 document" in warned(
        {"kind": "shards", "path": f"{folder}/copy-shards"}
    )
    assert not warned({"kind": "shards", "path": f"{folder}/other-shards"})


@pytest.mark.once
def test_a_run_says_so(folder, tmp_path, caplog):
    given = tiny.config(f"{folder}/train/*", model__pattern="retnet", train__steps=1)
    given.val = {"seen": configs.data(kind="text", val_path=f"{folder}/train/*")}
    trainer.train(configs.resolve(given), tmp_path / "run")
    assert caplog.text.count("are trained on, too") == 1 and "val.seen: of the 10" in caplog.text
