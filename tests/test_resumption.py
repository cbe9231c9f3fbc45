"""What a run makes of a workdir that was harmed, renamed, or is to be gone on with otherwise."""

import errno
import json
import math
import shutil
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import loop, trainer
from hybridlm.errors import ConfigError
from tests import tiny

pytestmark = pytest.mark.once  # test_trainer and test_checkpoint resume on every jax


def resolved(text, **fields):
    every = {"train__steps": 6, "checkpoint__every_steps": 2, "checkpoint__keep_last": 3}
    decay = {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.5}
    return configs.resolve(tiny.config(text, **{"model__pattern": "retnet"} | every | decay | fields))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    trainer.train(resolved(text), workdir)
    return workdir


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def steps(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_a_last_line_that_was_lost_is_written(text, whole, run):
    """Killed between the final save and its line."""
    path = run / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    trainer.train(resolved(text), run)
    assert tiny.lines(run) == tiny.lines(whole)


def test_a_final_save_that_was_lost_is_made_again(text, whole, run):
    """Killed between the last line and the end of the final save."""
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "6.orbax-checkpoint-tmp")
    trainer.train(resolved(text), run)
    assert tiny.lines(run) == tiny.lines(whole) and steps(run) == ["2", "4", "6"]


def test_damaged_lines_are_set_aside(text, run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + b"\0" * 40 + b"\n\xff\n" + b"".join(lines[3:]))
    trainer.train(resolved(text), run)
    assert [line["step"] for line in tiny.lines(run)] == [1, 2, 4, 5, 6]
    assert (run / "metrics.jsonl.damaged").read_bytes() == b"\0" * 40 + b"\n\xff\n"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"[" * 9999, b"\xff"])
def test_a_damaged_config_is_the_checkpoints(text, run, damage):
    (run / "config.json").write_bytes(damage)
    assert configs.of_run(run) == resolved(text)
    assert configs.resolve(configs.load(str(run / "config.json"))) == resolved(text)


def test_a_renamed_checkpoint_has_its_own_step(text, whole, run, caplog):
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "40")
    (run / "checkpoints" / "1²").mkdir()  # a digit to Python, and no number
    trainer.train(resolved(text), run)
    assert "40: it is of step 6; named so again" in caplog.text
    (run / "checkpoints" / "1²").rmdir()
    assert steps(run) == ["2", "4", "6"] and tiny.lines(run) == tiny.lines(whole)


def test_a_link_with_a_number_is_no_checkpoint(text, whole, run):
    (run / "checkpoints" / "40").symlink_to("6")
    trainer.train(resolved(text), run)
    assert steps(run) == ["2", "4", "6"] and tiny.lines(run) == tiny.lines(whole)


def test_damage_of_an_older_checkpoint_is_no_hindrance(text, whole, run):
    """Every file of those that are not needed emptied, each with its seal: the newest is sound."""
    for path in [path for step in "24" for path in (run / "checkpoints" / step).rglob("*")]:
        if path.is_file():
            path.write_bytes(b"")
    trainer.train(resolved(text, train__steps=8), run)
    assert tiny.lines(run)[:6] == tiny.lines(whole) and {"6", "8"} <= set(steps(run))


def test_a_damaged_checkpoint_stays_on_its_file_system(text, whole, run, tmp_path, monkeypatch, caplog):
    """checkpoints/ is a link to elsewhere, which a rename does not cross."""
    elsewhere, rename = tmp_path / "elsewhere", Path.rename
    shutil.move(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)

    def within(path, target):
        if (elsewhere in path.resolve().parents) != (elsewhere in Path(target).resolve().parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", within)
    (elsewhere / "6" / "run" / "metadata").write_bytes(b"")
    trainer.train(resolved(text), run)
    assert tiny.lines(run) == tiny.lines(whole) and "passed over damaged checkpoints" in caplog.text
    assert [path.name.partition("-")[0] for path in (elsewhere / "damaged").iterdir()] == ["6"]


def test_a_decayed_run_that_is_extended_is_warned(text, run, caplog):
    trainer.train(resolved(text, train__steps=8), run)
    assert "0.001 at step 6, then 0.00325 (wsd over 8 steps): it had decayed and rises again" in caplog.text


def test_held_out_text_that_changed_is_said(text, tmp_path, caplog):
    """It decides no batch, so that the run goes on."""
    (tmp_path / "a.txt").write_text("held out " * 20)
    given = lambda steps: resolved(text, train__steps=steps, data__val_path=f"{tmp_path}/a.txt")
    trainer.train(given(2), tmp_path / "run")
    trainer.train(given(3), tmp_path / "run")
    assert "holds out others" not in caplog.text
    (tmp_path / "a.txt").write_text("other text " * 20)
    trainer.train(given(4), tmp_path / "run")
    assert "data holds out others than up to step 3: losses on them do not compare" in caplog.text


def staged(text, first=2, last=4, **fields):
    c = tiny.config(text, model__pattern="retnet", optimizer__schedule="wsd", optimizer__decay_fraction=0.5)
    c.stages = {"order": ("a", "b"), "a": {"train": {"steps": first}}}
    c.stages["b"] = {"train": {"steps": last} | fields}
    return configs.resolve(c)


def test_the_last_stage_may_change_as_a_run_without_stages(text, tmp_path, caplog):
    trainer.train(staged(text), tmp_path)
    changed, ended = "a resumed run cannot change it", "= 3: the checkpoint is already at step 6"
    for change, why in ("a.first", changed), ("b.batch_size", changed), ("b.last", ended):
        stage, name = change.split(".")
        field = f"stages.{stage}.train.{name if name == 'batch_size' else 'steps'}"
        with pytest.raises(ConfigError, match=f"{field} .*{why}"):
            trainer.train(staged(text, **{name: 4 if name == "batch_size" else 3}), tmp_path)
    trainer.train(staged(text, last=6), tmp_path)
    last = tiny.lines(tmp_path)
    assert [line["step"] for line in last] == list(range(1, 9))
    assert last[6]["learning_rate"] == pytest.approx(0.01 * (1 - 0.9 * 2 / 3))  # update 5 of 6, 2 of decay
    assert "0.001 at step 6, then 0.004 (wsd over 6 steps): it had decayed and rises again" in caplog.text


def test_another_pattern_is_refused_in_two_lines(text, run):
    with pytest.raises(ConfigError) as caught:
        trainer.train(resolved(text, model__pattern="retnet full"), run)
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        "model.pattern = 'retnet full': this workdir holds a run of another pattern, 'retnet'"
    )
    assert second.startswith("Give another --workdir") and len(first + second) < 250


def test_another_metric_ranks_old_checkpoints_last(text, run):
    trainer.train(resolved(text, train__steps=8, checkpoint__best_metric="loss"), run)
    assert "8" in steps(run)


@pytest.mark.parametrize("name", ["r[1]", "a\\b", "gs:", "x*", "q?", "u\udcff"])
def test_a_place_that_cannot_be_read_again_is_refused(text, tmp_path, name):
    with pytest.raises(ConfigError, match="no checkpoint can be kept below a path with"):
        trainer.train(resolved(text), tmp_path / name / "run")
    assert not (tmp_path / name).exists()


def test_a_prompt_that_is_no_utf8_is_refused(text):
    with pytest.raises(ConfigError, match=r"eval.sample_prompt.* UTF-8"):
        resolved(text, eval__sample_prompt="a\udcff")


def test_a_validation_that_is_not_finite_costs_nothing(text, whole, run, tmp_path, monkeypatch):
    """Null in the line, an event, and a checkpoint that ranks nowhere."""
    monkeypatch.setattr(loop.Loop, "validated", lambda self, *_: [{"val_loss": math.nan}])
    trainer.train(resolved(text, train__steps=8), run)
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"step": 8' in last and '"val_loss": null' in last
    event = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert event == {"step": 8, "event": "not finite", "metrics": ["val_loss"]}
    assert "8" in steps(run)
