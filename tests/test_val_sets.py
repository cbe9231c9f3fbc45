"""Several held-out sets by name (`config.val`): declared, refused, and measured beside the first."""

import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import model, trainer, weights
from hybridlm.data.prepare import prepare
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from hybridlm.run import logbook, picture
from tests import tiny


def resolved(text, **sets):
    given = tiny.config(text, model__pattern="retnet", train__steps=2, eval__every_steps=1)
    given.val = {name: configs.data(**settings) for name, settings in sets.items()}
    return configs.resolve(given)


@pytest.mark.once
def test_each_is_measured_by_its_name(text, tmp_path):
    """One that is the first has its numbers, another those of its text, and nothing else knows of them."""
    line = "state gate decay chunk head"
    (tmp_path / "line.txt").write_text(line)
    alone = {"kind": "text", "val_path": f"{tmp_path}/line.txt"}
    same = {"kind": "text", "path": text, "holdout": 0.3}
    trainer.train(resolved(text, same=same, line=alone), tmp_path / "run")
    first, last = tiny.lines(tmp_path / "run")
    for record in (first, last):
        for name in ("loss", "accuracy", "bpb"):
            assert record[f"val/same/{name}"] == record[f"val_{name}"] != record[f"val/line/{name}"]
    assert [n for n in last if picture.VAL_SET.fullmatch(n)] == ["val/line/loss", "val/same/loss"]

    _, definition, params, _ = weights.load(tmp_path / "run")
    ids = np.array([256, *line.encode(), 256])  # a document begins and ends with its mark
    nats = 0.0
    for begin in range(0, len(ids) - 1, 16):
        row = ids[None, begin : begin + 17]
        tokens, targets = row[:, :-1], row[0, 1:]
        logits = model.logits(definition, params, tokens, single_document(*tokens.shape))
        p = np.exp(np.asarray(logits[0], np.float64))
        nats -= np.log(p[np.arange(len(targets)), targets] / p.sum(-1)).sum()
    assert last["val/line/loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert last["val/line/bpb"] == pytest.approx(nats / np.log(2) / len(line), rel=1e-5)


def test_a_config_keeps_them(text, tmp_path):
    config = resolved(text, code={"kind": "text", "val_path": text})
    assert configs.resolve(configs.ConfigDict(config.to_dict())) == config
    path = "configs/quickstart.py"
    given = {"val.x.val_path": text, "val.x.kind": "text", "val.y.kind": "mqar"}
    loaded = configs.resolve(configs.load(path, given))
    assert loaded.val["x"].val_path == text and loaded.val["y"].kind == "mqar"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"val.code.path": "x"}, "val.code.path = 'x': there is no val.code. There is none yet."),
        ({"val.code.kind": "txt"}, "val.code.kind = 'txt': must be one of .* Did you mean 'text'?"),
        ({"val.a.kind": "text", "val.a.pth": "x"}, "val.a.pth = 'x': no such field. Did you mean 'path'?"),
    ],
)
def test_what_is_no_set_is_refused(overrides, problem):
    with pytest.raises(ConfigError, match=problem.replace("?", r"\?")):
        configs.load("configs/quickstart.py", overrides)


def test_a_set_that_cannot_be_read_is_refused_by_its_name(text, tmp_path):
    missing = f"{tmp_path}/none.txt"
    for problem, settings in {
        "val.a.path = '': must name files": {"kind": "text"},
        "val.a.val_path = .*none.txt'": {"kind": "text", "val_path": missing},
        "data.path = '': must name files": {},
    }.items():
        given = resolved(text, **({"a": settings} if settings else {}))
        if not settings:
            given = given.replace(data__path="", data__val_path=text)
        with pytest.raises(ConfigError, match=problem):
            trainer.train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_a_damaged_set_costs_its_own_numbers(text, tmp_path):
    """Neither a step, nor what other sets measure; the run is that of one without the set."""
    prepare(text, str(tmp_path / "shards"), "bytes", holdout=0.3)
    [shard] = (tmp_path / "shards").glob("val-*.tokens")
    content = bytearray(shard.read_bytes())
    content[9] ^= 1
    shard.write_bytes(content)
    same = {"kind": "text", "path": text, "holdout": 0.3}
    sets = {"bad": {"kind": "shards", "path": str(tmp_path / "shards")}, "same": same}
    trainer.train(resolved(text, **sets), tmp_path / "run")
    for line in tiny.lines(tmp_path / "run"):
        assert line["val/same/loss"] == line["val_loss"] and not any("bad" in name for name in line)
    events = logbook.read(tmp_path / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["val/bad failed"] * 2
    assert all("val-00000.tokens: the shard is damaged" in event["error"] for event in events)
    assert weights.load(tmp_path / "run").step == 2
