import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import config_file, generate, loop, member, model, program, schema, sharding, trainer, weights
from hybridlm.errors import ConfigError, RunError
from hybridlm.rows import Rows
from hybridlm.run import picture
from hybridlm.run.checkpoint import Checkpoints
from tests import tiny

ROOT = Path(__file__).parents[1]


def resolved(text, **fields):
    return configs.resolve(tiny.config(text, **fields))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(workdir, what `train` returned, config) of one whole run."""
    workdir = tmp_path_factory.mktemp("run")
    every = {"checkpoint__every_steps": 7, "eval__every_steps": 9, "log__every_steps": 2}
    config = resolved(text, train__steps=40, optimizer__schedule="wsd", eval__sample_tokens=8, **every)
    return workdir, trainer.train(config, workdir), config


def test_a_run_writes_what_it_promises(finished):
    workdir, _, config = finished
    names = {"config.json", "layers.json", "metrics.jsonl", "loss.png", "checkpoints"}
    assert names <= {path.name for path in workdir.iterdir()}
    assert configs.resolve(config_file.from_json(workdir / "config.json")) == config
    assert json.loads((workdir / "layers.json").read_text())["full_layers"] == [1]
    with Checkpoints(workdir / "checkpoints") as saves:
        assert {35, 40} <= set(saves.steps()) and len(saves.steps()) <= 3  # the newest two, and the best
        assert saves.record(40)["step"] == 40


def test_metrics_are_complete_and_finite(finished):
    workdir, returned, _ = finished
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted({*range(2, 41, 2), *range(7, 40, 7), *range(9, 40, 9)})  # logged, saved, validated
    always = {"step", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second"}
    always |= {"step_seconds", "data_seconds", "compute_seconds"}
    for record in records:
        assert always <= record.keys()
        assert all(math.isfinite(value) for value in record.values() if not isinstance(value, str))
        assert record["compute_seconds"] + record["data_seconds"] == pytest.approx(record["step_seconds"])
        assert record["tokens_per_second"] == pytest.approx(8 * 16 / record["step_seconds"])
        assert ("val_loss" in record) == ("val_bpb" in record) == (record["step"] in (9, 18, 27, 36, 40))
        assert ("sample" in record) == (record["step"] == 40)
    assert {"step": 40} | returned == records[-1]
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_numbers_are_those_of_the_model(finished):
    """Losses recomputed from all logits and the saved parameters, in float64."""
    workdir, returned, config = finished
    definition = model.build(config)
    held_out = member.build_data(config, "val")
    params = weights.load(workdir).params
    nats = count = 0.0
    for index in range(2):
        batch = held_out.batch(index)
        rows = Rows(batch["segment_ids"], batch["positions"])
        logits = np.asarray(model.logits(definition, params, batch["tokens"], rows), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        counted = batch["targets"] >= 0
        nats -= np.take_along_axis(log_p, np.maximum(batch["targets"], 0)[..., None], -1)[..., 0][
            counted
        ].sum()
        count += counted.sum()
    assert returned["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    num_bytes = len(held_out.held_out_bytes(2))
    assert returned["val_bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_finished_run_resumed_only_tells_its_result(finished, capsys):
    workdir, returned, config = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = trainer.train(config, workdir, resume="must")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert {name: returned[name] for name in again} == again and "val_bpb" in again
    shown = capsys.readouterr().out
    for part in (
        "gzip -9",
        "order-0 entropy",
        f"this model       {again['val_bpb']:.3f}",
        "full attention: 1 of 2",
    ):
        assert part in shown


@pytest.mark.once
def test_microbatches_add_up_to_the_batch(text):
    """Sums are accumulated and divided once, so parts with unequal numbers of targets make no difference."""
    results = []
    for microbatches in (1, 4):
        config = resolved(
            text,
            model__pattern="retnet",
            train__microbatches=microbatches,
            objective__z_loss=1e-3,
            optimizer__eps=1e-3,
        )
        mesh = sharding.make_mesh(schema.Mesh(1, 1, 1))
        source = member.build_data(config, "train")
        built = program.build(config, model.build(config), mesh, source.token_bytes)
        batch = source.batch(0)
        batch["targets"][:3] = -1
        state, metrics = built.step(built.init(jax.random.key(0)), sharding.put_batch(batch, mesh))
        results.append((state, metrics))
    (one, metrics_one), (parts, metrics_parts) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics_one, metrics_parts)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)
    jax.tree.map(close, one["params"], parts["params"])


@pytest.mark.once
def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path):
    config = resolved(
        text,
        model__pattern="retnet",
        optimizer__learning_rate=1e9,
        optimizer__warmup_steps=0,
        checkpoint__every_steps=1,
        train__max_skipped=1,
    )
    with pytest.raises(RunError, match=r"step \d: .* update is not finite, 2 updates in a row"):
        trainer.train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as saves:  # the last one written before is whole
        record = saves.record(saves.steps()[-1])
    assert record["step"] == saves.steps()[-1] < 6


def test_batch_that_the_mesh_does_not_divide_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config: type("Mesh", (), {"shape": dict(data=3, fsdp=1)})
    )
    with pytest.raises(ConfigError, match=r"train.batch_size = 8: .*mesh.data \* mesh.fsdp = 1 \* 3 \* 1"):
        trainer.train(resolved(text), tmp_path)


def test_a_checkpoint_beyond_the_end_is_refused(finished):
    workdir, _, config = finished
    shorter = config.replace(train__steps=30)
    with pytest.raises(ConfigError, match=r"train\.steps = 30: the checkpoint is already at step 40"):
        trainer.train(shorter, workdir)


def test_kill_and_resume_equals_an_uninterrupted_run(finished, tmp_path):
    """kill -9 at a random moment after the first line; the lines of both runs are equal bit for bit."""
    whole, _, config = finished
    (tmp_path / "config.json").write_text(configs.to_json(config))
    command = [sys.executable, "train.py", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}"]
    chance = random.Random()
    count, pause = chance.randint(1, 24), chance.random() / 50
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(pause)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, f"the run ended within {pause:.4f} s of line {count}"

    before = tiny.lines(tmp_path)
    trainer.train(config, tmp_path, resume="auto")
    assert tiny.lines(tmp_path) == tiny.lines(whole), f"killed {pause:.4f} s after line {count}"
    assert before == tiny.lines(whole)[: len(before)]


@pytest.mark.slow
def test_resumption_keeps_to_the_data_when_the_split_and_the_schedule_change(text, tmp_path):
    """Six steps, then nine in two microbatches: as nine steps without an interruption."""
    fields = {"model__pattern": "retnet", "optimizer__schedule": "constant", "checkpoint__every_steps": 6}
    whole = resolved(text, train__steps=9, **fields)
    trainer.train(whole, tmp_path / "whole")
    trainer.train(resolved(text, train__steps=6, **fields), tmp_path / "run")
    trainer.train(resolved(text, train__steps=9, train__microbatches=2, **fields), tmp_path / "run")
    lines, expected = tiny.lines(tmp_path / "run"), tiny.lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_checkpoint_from_before_a_field_existed_resumes(finished, tmp_path, caplog):
    """A field that an older version did not know has its default there: nothing has changed."""
    whole, _, config = finished
    shutil.copytree(whole, tmp_path / "old")
    checkpoint = tmp_path / "old" / "checkpoints" / "40"
    (checkpoint / "SHA256SUMS").unlink()  # nor did it know seals
    path = checkpoint / "run" / "metadata"
    record = json.loads(path.read_text())
    del record["config"]["model"]["post_norm"], record["config"]["train"]["max_skipped"]
    path.write_text(json.dumps(record))
    with caplog.at_level("INFO", "hybridlm"):
        trainer.train(config, tmp_path / "old", resume="must")
    assert "has no SHA256SUMS; reading it whole" in caplog.text and "with a change" not in caplog.text
    bigger = config.to_dict()
    bigger["model"].update(d_model=32, post_norm=("retnet",))
    with pytest.raises(ConfigError, match=r"model.d_model: 16 -> 32; model.post_norm: \[\] -> \['retnet'\]"):
        trainer.train(configs.resolve(ConfigDict(bigger)), tmp_path / "old")


def test_training_and_sampling_twice_give_the_same_bits(finished, tmp_path):
    whole, _, config = finished
    trainer.train(config, tmp_path)
    assert tiny.lines(tmp_path) == tiny.lines(whole)


def test_a_backend_that_may_differ_says_so(caplog, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level("INFO", "hybridlm"):
        loop.Loop.say_determinism(None)
        monkeypatch.setenv("XLA_FLAGS", loop.DETERMINISTIC)
        loop.Loop.say_determinism(None)
    assert caplog.text.count("two runs may differ in the last bits here") == 1


def test_an_imported_model_is_no_run(finished, tmp_path):
    _, _, config = finished
    with Checkpoints(tmp_path / "checkpoints") as saves:
        saves.save(0, {"params": {"w": np.ones(3, np.float32)}}, {"step": 0})
    with pytest.raises(ConfigError, match=r"holds an imported model, not a run.*--config.init_from="):
        trainer.train(config, tmp_path)


@pytest.mark.once
def test_looking_never_costs_a_step(text, tmp_path, monkeypatch, caplog):
    """Validation, tasks, sampling and the picture all fail; the run is that of one that did not look."""
    config = resolved(text, train__steps=4, eval__every_steps=2, eval__sample_tokens=4)

    def broken(*args, **options):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "of the test")

    for module, name in ((loop.Loop, "validated"), (generate, "complete"), (picture, "plot")):
        monkeypatch.setattr(module, name, broken)
    trainer.train(config, tmp_path, evaluate=broken)
    assert [line["step"] for line in tiny.lines(tmp_path)] == [1, 2, 3, 4]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    said = [(event["step"], event["event"]) for event in events]
    both = [f"{what} failed" for what in ("validation", "eval.tasks")]
    assert said == [*((2, what) for what in both), *((4, what) for what in (*both, "sample failed"))]
    assert all("of the test" in event["error"] for event in events)
    assert "drawing loss.png failed" in caplog.text
    assert weights.load(tmp_path).step == 4
