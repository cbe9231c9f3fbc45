import json
import logging
import resource
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.errors import ConfigError, RunError
from hybridlm.run import checkpoint, sound
from hybridlm.run.checkpoint import Checkpoints


def state(value):
    params = {
        "embedding": jnp.full((4, 3), float(value)),
        "layers": {0: {"w": jnp.arange(6.0) + value}},
    }
    return {"params": params, "step": jnp.int32(value)}


def record(step, **config):
    return {"step": step, "config": config, "fingerprint": "abc"}


def save(directory, losses, **options):
    """Saves one checkpoint per entry of ``losses`` ({step: loss or None}), each known after its save."""
    scores = options.pop("scores", {})
    with Checkpoints(directory, **options) as saves:
        saves.scores.update(scores)
        for step, loss in losses.items():
            saves.save(step, state(step), record(step))
            saves.wait()
            if loss is not None:
                saves.scores[step] = loss


def shapes(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, {3: 1.0, 5: None})
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == [3, 5]
        back = saves.restore(3, shapes(state(0)))
        assert jax.tree.structure(back) == jax.tree.structure(state(0))
        jax.tree.map(np.testing.assert_array_equal, back, state(3))
        params = saves.restore(5, {"params": shapes(state(0))["params"]})  # without the rest of the state
        jax.tree.map(np.testing.assert_array_equal, params, {"params": state(5)["params"]})
        assert saves.record(5) == record(5)


def test_a_place_that_is_said_by_way_of_another(tmp_path):
    there = tmp_path / "other" / ".." / "runs"
    save(there, {3: None})
    with Checkpoints(there) as saves:
        back = saves.restore(saves.chosen(None), shapes(state(0)))
    jax.tree.map(np.testing.assert_array_equal, back, state(3))
    assert Checkpoints(tmp_path / "runs").steps() == [3]


def test_a_save_survives_the_donation_of_its_state(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    current = state(2)
    with Checkpoints(tmp_path) as saves:
        saves.save(2, current, record(2))
        current = overwrite(current)
        saves.wait()
        jax.tree.map(np.testing.assert_array_equal, saves.restore(2, shapes(current)), state(2))


@pytest.mark.parametrize(
    ("last", "best", "losses", "kept"),
    [
        (2, 1, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0}, [2, 4, 5]),
        (2, 1, {1: 3.0, 2: 2.0, 3: 1.0}, [2, 3]),
        (1, 2, {1: 1.0, 2: 2.0, 3: None, 4: 3.0}, [1, 2, 4]),
        (1, 0, {1: 1.0, 2: 2.0}, [2]),
        (1, 1, {1: None, 2: None, 3: None}, [3]),
    ],
)
def test_newest_and_best_are_kept(tmp_path, last, best, losses, kept):
    save(tmp_path, losses, last=last, best=best)
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == kept


def test_the_best_is_still_known_after_a_restart(tmp_path):
    """From the scores that the caller read again; one that is not known ranks last."""
    save(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}, last=1)
    save(tmp_path, {4: 4.0, 5: 5.0}, last=1, scores={1: 1.0, 3: 3.0})
    with Checkpoints(tmp_path, last=1) as saves:
        saves.scores.update({1: 1.0, 5: 5.0})
        assert saves.steps() == [1, 5]
    save(tmp_path, {6: 0.5, 7: None}, last=1)  # of another metric: 1 and 5 have no score
    with Checkpoints(tmp_path, last=1) as saves:
        assert saves.steps() == [6, 7]


def test_resume_modes(tmp_path):
    with Checkpoints(tmp_path) as saves:
        assert checkpoint.choose("auto", saves) is None
        assert checkpoint.choose("never", saves) is None
        with pytest.raises(ConfigError, match="--resume = 'must': there is no checkpoint"):
            checkpoint.choose("must", saves)
    save(tmp_path, {1: None, 9: None})
    with Checkpoints(tmp_path) as saves:
        assert checkpoint.choose("auto", saves) == 9
        assert checkpoint.choose("must", saves) == 9
        with pytest.raises(ConfigError, match="already holds checkpoints up to step 9"):
            checkpoint.choose("never", saves)


BASE = {
    "model": {"pattern": "kda*3 full", "d_model": 64, "remat": "full"},
    "mixers": {"kda": {"kind": "kda", "num_heads": 4}},
    "data": {"kind": "text", "path": "/a/*.py"},
    "train": {"steps": 100, "seed": 0, "batch_size": 8, "seq_len": 32, "microbatches": 1},
    "optimizer": {"name": "adamw", "learning_rate": 0.1},
    "mesh": {"data": -1},
}


def changed(**fields):
    """(record of a checkpoint, record of a run with other ``fields``; dots as double underscores)."""
    config = json.loads(json.dumps(BASE))
    after = {"config": config, "fingerprint": fields.pop("fingerprint", "abc")}
    for name, value in fields.items():
        section, field = name.split("__", 1)
        config[section][field] = value
    return {"config": BASE, "fingerprint": "abc"}, after


@pytest.mark.parametrize(
    "fields",
    [
        {"model__pattern": "kda full"},
        {"model__d_model": 128},
        {"mixers__kda": {"kind": "kda", "num_heads": 2}},
        {"mixers__gdn": {"kind": "gated_delta_net"}},
        {"train__seed": 1},
        {"train__batch_size": 16},
        {"train__seq_len": 64},
        {"optimizer__name": "muon"},
        {"fingerprint": "def"},
    ],
)
def test_changes_that_are_refused(fields):
    name = next(iter(fields)).replace("__", ".").replace("fingerprint", "data.fingerprint")
    with pytest.raises(ConfigError, match=name):
        checkpoint.check_unchanged(*changed(**fields))


def test_a_refusal_shows_the_whole_diff():
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_unchanged(
            *changed(model__d_model=128, train__seed=1, fingerprint="def", data__path="/b")
        )
    for part in ("model.d_model: 64 -> 128", "train.seed: 0 -> 1", "data.path: '/a/*.py' -> '/b'"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_unchanged(*changed(train__seq_len=64, fingerprint="def"))
    assert str(caught.value).startswith("train.seq_len = 64:")  # and not with what follows from it


def test_a_pattern_that_spells_the_same_layers_is_no_change():
    pattern = BASE["model"]["pattern"]
    for same in (f" ( {pattern} ) ", f"{pattern}\n"):
        checkpoint.check_unchanged(*changed(model__pattern=same))
    with pytest.raises(ConfigError, match="another pattern"):
        checkpoint.check_unchanged(*changed(model__pattern=f"({pattern})*2"))


def test_changes_that_are_honoured(caplog):
    fields = {"mesh__data": 2, "train__steps": 200, "train__microbatches": 4, "model__remat": "none"}
    with caplog.at_level(logging.INFO, "hybridlm"):
        checkpoint.check_unchanged(
            *changed(data__path="/elsewhere/*.py", optimizer__learning_rate=0.2, **fields)
        )
    assert "train.steps: 100 -> 200" in caplog.text and "no effect" not in caplog.text
    before, after = changed()
    checkpoint.check_unchanged(before, after | {"config": after["config"] | {"init_from": "runs/x"}})
    assert "no effect on a resumed run" in caplog.text and "-> 'runs/x'" in caplog.text


def test_unreadable_checkpoint_is_named(tmp_path):
    save(tmp_path, {3: None, 5: None})
    for file in (tmp_path / "5").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(b"\0" * 50)
    with Checkpoints(tmp_path) as saves:
        with pytest.raises(RunError, match=r"/5: damaged checkpoint: .*; remove .* to resume from step 3"):
            saves.restore(5, shapes(state(0)))
        jax.tree.map(np.testing.assert_array_equal, saves.restore(3, shapes(state(0))), state(3))


def test_a_checkpoint_that_its_run_removes_while_it_is_read(tmp_path):
    save(tmp_path, {3: None})
    with Checkpoints(tmp_path) as saves:
        shutil.rmtree(tmp_path / "3")
        for read in (lambda: saves.record(3), lambda: saves.restore(3, shapes(state(0)))):
            with pytest.raises(RunError, match="has removed it meanwhile: start again"):
                read()


def test_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    save(tmp_path, {3: None})
    with Checkpoints(tmp_path) as saves:
        half_written = tmp_path / "4.orbax-checkpoint-tmp"
        half_written.mkdir()
        (half_written / sound.COMMITTED).write_text("committed\n")
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
        with pytest.raises(
            RunError, match=r"step 5 needs 76 bytes .* 10 free; the checkpoint at step 3 is intact"
        ):
            saves.save(5, state(5), record(5))
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == [3]


def test_a_write_that_fails_in_the_background_is_an_error_and_harms_nothing(tmp_path):
    """A limit on file size stands in for a disk that fills up while a save is under way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    save(tmp_path, {3: None})
    try:
        message = r"could not be written.*; the checkpoint at step 3 is intact"
        with pytest.raises(RunError, match=message), Checkpoints(tmp_path) as saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
            saves.save(5, {"params": params}, record(5))
            with pytest.raises(RunError, match=message):  # told at once, and 5 is not said to be intact
                saves.save(6, state(6), record(6))
            saves.save(7, {"params": params}, record(7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == [3]
        jax.tree.map(np.testing.assert_array_equal, saves.restore(3, shapes(state(0))), state(3))


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="checkpoints cannot be kept there"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_removal_cut_short_by_a_kill_is_ended_by_the_next_save(tmp_path):
    save(tmp_path, {3: 0.3, 5: 0.5, 7: 0.7}, last=2, best=1)
    for entry in (tmp_path / "3").iterdir():
        if entry.name != "step":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    sound.mend(tmp_path)
    save(tmp_path, {9: None}, last=2, best=1, scores={3: 0.3, 5: 0.5, 7: 0.7})
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == [5, 7, 9]
        jax.tree.map(np.testing.assert_array_equal, saves.restore(9, shapes(state(0))), state(9))


def test_a_save_cut_short_by_a_kill_is_no_checkpoint(tmp_path):
    code = """
        import os, sys
        import jax.numpy as jnp
        from hybridlm.run.checkpoint import Checkpoints
        saves = Checkpoints(sys.argv[1])
        saves.save(1, {"params": {"w": jnp.ones((1 << 22,))}}, {})
        saves.wait()
        saves.save(2, {"params": {"w": jnp.ones((1 << 24,))}}, {})
        while len(os.listdir(sys.argv[1])) < 2:  # it is written in the background
            pass
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], check=False)
    assert len(list(tmp_path.iterdir())) == 2, "the second save should have left something behind"
    sound.mend(tmp_path)
    with Checkpoints(tmp_path) as saves:
        assert saves.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "change", [{"config": 3}, {"fingerprint": None}, {"skipped": [1]}, {"unwritten": []}]
)
def test_a_record_of_another_shape_is_one_line(tmp_path, change):
    with Checkpoints(tmp_path) as saves:
        saves.save(5, {"step": np.int32(5)}, record(5) | change)
        saves.wait()
        with pytest.raises(RunError, match=r"/5: (unreadable|damaged) checkpoint: .*record.*; no older"):
            saves.record(5)
