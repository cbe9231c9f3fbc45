"""Long Range Arena's kinds: expressions that Python evaluates, curves followed by pixels, texts of a file."""

import collections
import json
import statistics

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data import listops, pathfinder
from hybridlm.errors import ConfigError
from tests.test_data_generated import rows_of

SPELT = {**{d: f"{d}," for d in range(10)}, 14: "),"} | {
    10 + i: f"{name}(" for i, name in enumerate(listops.OPERATORS)
}
MEANT = {
    "MIN": lambda *x: min(x),
    "MAX": lambda *x: max(x),
    "MED": lambda *x: int(statistics.median(x)),
    "SM": lambda *x: sum(x) % 10,
}


def test_listops_is_what_python_makes_of_it():
    tokens, targets = rows_of("listops", 256, 200, vocab=32, depth=10)
    labels = collections.Counter()
    for row, target in zip(tokens.tolist(), targets, strict=True):
        written = [token for token in row if token != listops.PAD]
        assert row[-1] == listops.MARK and row[-len(written) :] == written and 50 < len(written) - 1 < 200
        [value] = eval("".join(SPELT[token] for token in written[:-1]), MEANT.copy())
        assert target[-1] == value and (target[:-1] == -1).all()
        labels[value] += 1
    assert max(labels.values()) / 256 < listops.CONSTANT + 0.08 and len(labels) == 10


def follow(image: np.ndarray) -> int:
    """1 if lit pixels lead from the brightest spot to the next one. Curves that touch mislead it."""
    bright = np.lib.stride_tricks.sliding_window_view(image, (3, 3)).sum(axis=(2, 3))
    ends = []
    for _ in range(2):
        y, x = np.unravel_index(bright.argmax(), bright.shape)
        ends.append((y + 1, x + 1))
        bright[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5] = 0
    lit = np.argwhere(image > 100)
    near = np.square(lit[:, None] - lit[None]).sum(axis=-1) <= 4
    seen, before = (lit == ends[0]).all(axis=1), 0
    while seen.sum() > before:
        before, seen = seen.sum(), near[seen].any(axis=0)
    return int(seen[(lit == ends[1]).all(axis=1)].any())


def test_pathfinder_can_be_followed():
    size = pathfinder.length(32)
    tokens, targets = rows_of("pathfinder", 100, size, vocab=pathfinder.VOCABULARY)
    label = targets[:, -1] - pathfinder.CLASSES
    assert set(label) == {0, 1} and 30 < label.sum() < 70 and (tokens[:, -1] == pathfinder.MARK).all()
    images = tokens[:, :-1].reshape(-1, 32, 32)
    assert images.max() == 255 and 0.15 < (images > 60).mean() < 0.5
    right = np.mean([follow(image) == one for image, one in zip(images, label, strict=True)])
    assert right > 0.66  # p < 0.001 for guessing


def text_file(folder, lines):
    path = folder / "texts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_labelled_text(tmp_path):
    lines = [{"text": f"{i} is é", "label": i % 2} for i in range(40)]
    path = text_file(tmp_path, [*lines, ""])
    build = lambda split: data.build(
        {"kind": "labelled_text", "path": path, "holdout": 0.3},
        split=split, batch_size=4, seq_len=8, seed=0, vocab_size=260,
    )  # fmt: skip
    found = {}
    for split in ("train", "val"):
        dataset = build(split)
        for step in range(-(-dataset.num_rows // 4)):
            batch = dataset.batch(step)
            for row, target in zip(batch["tokens"].tolist(), batch["targets"], strict=True):
                if target[-1] >= 0:
                    text = bytes(t for t in row if t < 256).decode(errors="ignore")
                    assert row[-1] == 257 and (target[:-1] == -1).all()
                    found.setdefault(split, {})[int(text.split()[0])] = target[-1] - 258
    assert not set(found["train"]) & set(found["val"]) and len(found["val"]) > 4
    assert all(label == number % 2 for part in found.values() for number, label in part.items())
    same = build("val").fingerprint
    text_file(tmp_path, [{"text": "other", "label": 0}, *lines])
    assert build("val").fingerprint != same


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "leaves no text"),
        (['{"text": "a"}'], "1'.*label is missing"),
        (['{"text": "a", "label": true}'], "label"),
        ([{"text": "a", "label": 1}, {"text": "a", "label": 2}], "2'.*2 classes"),
        ([{"text": "a", "label": 1}], "leaves no text"),
    ],
)
def test_labelled_text_refusals(lines, said, tmp_path):
    path = text_file(tmp_path, lines)
    with pytest.raises(ConfigError, match=said):
        rows_of("labelled_text", 1, 8, vocab=260, path=path)


@pytest.mark.parametrize(
    ("kind", "seq_len", "vocab", "fields", "field"),
    [
        ("listops", 200, 16, {}, "kind"),
        ("listops", 2000, 32, {"depth": 4}, "depth"),
        ("pathfinder", 1024, 300, {}, "size"),
        ("pathfinder", 1025, 258, {}, "kind"),
        ("pathfinder", 1025, 300, {"dashes": 40}, "dashes"),
        ("labelled_text", 64, 300, {}, "path"),
    ],
)
def test_refusals(kind, seq_len, vocab, fields, field):
    with pytest.raises(ConfigError) as caught:
        data.build(
            {"kind": kind, **fields}, split="val", batch_size=2, seq_len=seq_len, seed=0, vocab_size=vocab
        )
    assert caught.value.field == f"data.{field}"
