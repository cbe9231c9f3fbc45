"""`data.build` as the trainer meets it: pure batches, shares of processes, finite validation, refusals."""

import time

import numpy as np
import pytest

from hybridlm import data
from hybridlm.data.prepare import prepare
from hybridlm.errors import ConfigError

SIZES = {"batch_size": 8, "seq_len": 64, "seed": 3, "vocab_size": 300}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """One config of every kind over a small corpus."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(80):
        (root / f"{i}.txt").write_bytes(rng.integers(32, 127, rng.integers(1, 300), np.uint8).tobytes())
    prepare(f"{root}/*.txt", str(root / "shards"), "bytes", holdout=0.2, shard_tokens=1000)
    text = {"kind": "text", "path": f"{root}/*.txt", "holdout": 0.2}
    shards, mqar = (
        {"kind": "shards", "path": str(root / "shards")},
        {"kind": "mqar", "slices": "(64, 4), (32, 8)"},
    )
    parts = {"text": text | {"weight": 2.0}, "shards": shards | {"weight": 1}, "mqar": mqar | {"weight": 0.5}}
    return {
        "text": text,
        "shards": shards,
        "mqar": mqar,
        "mixture": {"kind": "mixture", "components": parts},
    }


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


KINDS = ["text", "shards", "mqar", "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_pure_however_they_are_read(configs, kind):
    dataset = data.build(configs[kind], split="train", **SIZES)
    batches = [dataset.batch(step) for step in range(30)]
    assert all(a.dtype == np.int32 and a.shape == (8, 64) for batch in batches for a in batch.values())
    assert not any(same(batches[0], batch) for batch in batches[1:])
    for start in (0, 1, 17):
        again = data.build(configs[kind], split="train", **SIZES)
        iterator = again.iterate(start)
        assert all(same(next(iterator), batch) for batch in batches[start:])
    other = data.build(configs[kind], split="train", **(SIZES | {"seed": 4}))
    assert other.fingerprint != dataset.fingerprint == again.fingerprint
    assert not same(other.batch(0), batches[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_share_one_order(configs, kind, split, processes):
    whole = data.build(configs[kind], split=split, **SIZES)
    parts = np.split(np.arange(SIZES["batch_size"]), processes)
    shares = [data.build(configs[kind], split=split, rows=rows, **SIZES) for rows in parts]
    last = 5 if whole.num_batches is None else whole.num_batches - 1
    for step in (0, last):
        parts = [share.batch(step) for share in shares]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert same(joined, whole.batch(step))
    assert {share.fingerprint for share in shares} == {whole.fingerprint}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_targets_follow_the_segments(configs, kind):
    batch = data.build(configs[kind], split="train", **SIZES).batch(2)
    names = ("tokens", "targets", "segment_ids", "positions")
    for row in range(8):
        tokens, targets, segments, positions = (batch[name][row] for name in names)
        assert ((segments > 0) | (targets == -1)).all()
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        assert (positions[starts] == 0).all()
        inside = (np.diff(segments) == 0) & (segments[1:] > 0)
        assert (np.diff(positions)[inside] == 1).all()
        if kind in ("text", "shards"):  # MQAR's targets are not the next token
            assert (targets[:-1][inside] == tokens[1:][inside]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_finite_and_filled_up(configs, kind):
    dataset = data.build(configs[kind], split="val", **SIZES)
    batches = list(dataset.iterate())
    assert len(batches) == dataset.num_batches == -(-dataset.num_rows // 8)
    assert all(same(batch, dataset.batch(step)) for step, batch in enumerate(batches))
    used = np.concatenate([batch["segment_ids"].max(axis=1) > 0 for batch in batches])
    assert used[: dataset.num_rows].all() and not used[dataset.num_rows :].any()
    assert list(dataset.iterate(dataset.num_batches)) == []
    with pytest.raises(IndexError):
        dataset.batch(dataset.num_batches)


@pytest.mark.parametrize("kind", ["text", "shards"])
def test_held_out_bytes_are_those_of_the_targets(configs, kind):
    dataset = data.build(configs[kind], split="val", **SIZES)
    for num_batches in (1, dataset.num_batches, None):
        batches = list(dataset.iterate())[:num_batches]
        targets = np.concatenate([batch["targets"].ravel() for batch in batches])
        text = dataset.held_out_bytes(num_batches)
        assert text == bytes(targets[(targets >= 0) & (targets < 256)].tolist())
        assert len(text) == dataset.token_bytes[targets[targets >= 0]].sum()


def test_text_and_shards_of_the_same_files_agree(configs):
    """Two code paths to the same tokens: in memory, and prepared."""
    text, shards = (data.build(configs[kind], split="val", **SIZES) for kind in ("text", "shards"))
    assert text.num_rows == shards.num_rows and text.vocab_size == shards.vocab_size == 257
    documents = [sorted(dataset.held_out_bytes()) for dataset in (text, shards)]
    assert documents[0] == documents[1]


def test_data_without_text_have_no_bytes(configs):
    for kind in ("mqar", "mixture"):
        dataset = data.build(configs[kind], split="val", **SIZES)
        assert dataset.token_bytes is None and dataset.tokenizer is None and dataset.held_out_bytes() == b""


def test_describe_is_a_line(configs):
    for kind in KINDS:
        line = data.build(configs[kind], split="train", **SIZES).source.describe()
        assert line and "\n" not in line


def test_a_batch_takes_less_than_five_milliseconds():
    sizes = {"batch_size": 8, "seq_len": 512, "seed": 0, "vocab_size": 257}
    dataset = data.build({"kind": "text", "path": "python-stdlib:"}, split="train", **sizes)
    dataset.batch(0)
    seconds = []
    for step in range(1, 40):
        start = time.perf_counter()
        dataset.batch(step)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 5e-3


def mixture_of(**part):
    return {"kind": "mixture", "components": {"a": part}}


TEXT = {"kind": "text", "path": "python-stdlib:"}
MQAR = {"kind": "mqar", "weight": 1}
REFUSALS = [
    ({"kind": "txt"}, {}, "data.kind", "Did you mean 'text'"),
    (TEXT | {"path": ""}, {}, "data.path", "must name files"),
    ({"kind": "shards"}, {}, "data.path", "must name the directory"),
    (TEXT | {"holdout": 1.0}, {}, "data.holdout", r"must be in \[0, 1\)"),
    ({"kind": "mqar", "slices": "(64, 4), 8"}, {}, "data.slices", "must read like"),
    ({"kind": "mqar", "power_a": 0}, {}, "data.power_a", "must be above 0"),
    ({"kind": "mqar", "val_examples": 0}, {}, "data.val_examples", "at least 1"),
    ({}, {}, "data.kind", "must be one of text, shards, mqar, copying"),
    (TEXT | {"pth": "x"}, {}, "data.pth", "Did you mean 'path'"),
    (TEXT | {"holdout": "x"}, {}, "data.holdout", "must be a number"),
    (TEXT | {"path": 3}, {}, "data.path", "must be a string"),
    (TEXT | {"num_pairs": 9}, {}, "data.num_pairs", "no such field"),
    (TEXT | {"path": "gone.txt"}, {}, "data.path", "does not exist"),
    (TEXT, {"vocab_size": 256}, "model.vocab_size", "must be at least 257"),
    (TEXT, {"batch_size": 0}, "train.batch_size", "positive"),
    (TEXT, {"batch_size": 10**9}, "train.batch_size", "rows of 64 tokens that the training data fill"),
    ({"kind": "mqar", "train_examples": 7}, {}, "train.batch_size", "is more than the 7 rows"),
    ({"kind": "mqar", "num_pairs": 50}, {}, "data.num_pairs", "4 \\* pairs"),
    ({"kind": "mqar", "random_non_queries": 1}, {}, "data.random_non_queries", "must be True or False"),
    ({"kind": "mixture"}, {}, "data.components", "must name the parts"),
    (mixture_of(**TEXT, weight=0), {}, "data.components.a.weight", "must be above 0"),
    (mixture_of(kind="x", weight=1), {}, "data.components.a.kind", "one of"),
    (mixture_of(kind="shards", path="gone", weight=1), {}, "data.components.a.path", "is no directory"),
    (
        {"kind": "mixture", "components": {"a": MQAR | {"train_examples": 7, "weight": 9}, "b": MQAR}},
        {"batch_size": 16},
        "data.components.a.weight",
        "asks for 14.4 rows of a batch of 16, of 7 that there are",
    ),
    (mixture_of(**TEXT, weight=1) | {"path": "x"}, {}, "data.path", "no such field"),
]


@pytest.mark.parametrize(
    ("config", "sizes", "field", "message"), REFUSALS, ids=[f"{i}-{r[2]}" for i, r in enumerate(REFUSALS)]
)
def test_bad_settings_are_refused_by_name(config, sizes, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        data.build(config, split="train", **(SIZES | sizes))
    assert error.value.field == field
