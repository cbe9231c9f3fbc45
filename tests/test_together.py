"""Runs in one program: the same numbers and files as alone, resumed alike, and one that fails by itself."""

import json
import math
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.errors import Stopped
from hybridlm.run import interrupt
from hybridlm.run.checkpoint import Checkpoints
from launch import worker
from launch.state import POINT

pytestmark = pytest.mark.once  # test_vmapped trains runs together on every jax
SMALL = {
    "model.pattern": "full",
    "model.num_layers": "1",
    "model.d_model": "16",
    "model.vocab_size": "32",
    "mixers.full.num_heads": "2",
    "mixers.full.head_dim": "8",
    "data.slices": "",
    "data.num_pairs": "2",
    "data.val_examples": "16",
    "train.seq_len": "16",
    "train.batch_size": "4",
    "train.steps": "12",
    "checkpoint.every_steps": "4",
    "eval.every_steps": "6",
    "eval.batches": "2",
    "log.every_steps": "3",
    "optimizer.warmup_steps": "2",
}


def resolved(**fields: str):
    return configs.resolve(
        configs.load("configs/mqar.py", SMALL | {k.replace("__", "."): v for k, v in fields.items()})
    )


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def failures(members) -> dict[Path, str]:
    return {one.workdir: one.failed for one in members if one.failed}


def folders(path: Path, names: str) -> list[Path]:
    made = [path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory):
    """(configs, workdirs, what failed) of three runs: another seed, another rate, and one that diverges."""
    chosen = [
        resolved(),
        resolved(train__seed="1", optimizer__learning_rate="1e-2"),
        resolved(optimizer__learning_rate="1e9", train__max_skipped="2", optimizer__warmup_steps="2"),
    ]
    workdirs = folders(tmp_path_factory.mktemp("packed"), "abc")
    return chosen, workdirs, failures(trainer.together(chosen, workdirs))


def test_a_run_is_what_it_would_be_alone(together, tmp_path: Path):
    chosen, workdirs, _ = together
    trainer.train(chosen[1], tmp_path / "alone")
    alone, own = records(tmp_path / "alone"), {record["step"]: record for record in records(workdirs[1])}
    assert [record["step"] for record in alone] == sorted(own)
    for record in alone:
        same = own[record["step"]]
        for name in ("loss", "grad_norm", "learning_rate", "val_loss", "val_accuracy"):
            assert (name in record) == (name in same)
            assert same.get(name, 0) == pytest.approx(record.get(name, 0), rel=1e-4)
        assert same["packed"] == 3
    with (
        Checkpoints(workdirs[1] / "checkpoints") as packed_saves,
        Checkpoints(tmp_path / "alone" / "checkpoints") as saves,
    ):
        assert packed_saves.steps() == saves.steps()


def test_one_that_diverges_fails_by_itself(together):
    _, workdirs, failed = together
    assert list(failed) == [workdirs[2]]
    assert "Lower the learning rate" in failed[workdirs[2]]
    assert [r["step"] for r in records(workdirs[0])][-1] == 12
    assert all(math.isfinite(record["loss"]) for record in records(workdirs[0]))


@pytest.mark.slow
def test_stopped_and_resumed(together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Asked to stop after step 5, both save there, and go on as if they had not been."""
    chosen, workdirs, _ = together
    again = folders(tmp_path, "ab")
    asked = iter([0] * 5)  # before the first step, and after four
    monkeypatch.setattr(interrupt.Stop, "asked", lambda self: next(asked, interrupt.TIME_LIMIT))
    with pytest.raises(Stopped, match="at step 5"):
        trainer.together(chosen[:2], again)
    monkeypatch.undo()
    assert failures(trainer.together(chosen[:2], again)) == {}
    for new, old in zip(again, workdirs, strict=False):
        losses = {record["step"]: record["loss"] for record in records(old)}
        shared = [record for record in records(new) if record["step"] in losses]
        assert {3, 6, 9, 12} <= {record["step"] for record in shared}
        for record in shared:
            assert record["loss"] == pytest.approx(losses[record["step"]], rel=1e-4)


def test_alike():
    assert trainer.alike(resolved()) == trainer.alike(resolved(train__seed="7", optimizer__learning_rate="1"))
    assert trainer.alike(resolved()) != trainer.alike(resolved(train__steps="7"))


def test_a_worker_says_that_a_run_never_warms_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """Once of all that are trained together."""
    chosen = [resolved(train__seed=seed, optimizer__warmup_steps="40") for seed in "01"]
    workdirs = folders(tmp_path, "ab")
    for config, workdir in zip(chosen, workdirs, strict=True):
        (workdir / POINT).write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(trainer, "stage", lambda *args: None)
    assert worker.work(workdirs) == 0
    assert caplog.text.count("the run: optimizer.warmup_steps = 40 are more than its 12 steps") == 1
