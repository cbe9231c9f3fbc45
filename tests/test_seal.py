import json
import shutil
import subprocess

import pytest

from hybridlm.errors import RunError
from hybridlm.run import seal, sound
from hybridlm.run.checkpoint import Checkpoints
from tests.test_checkpoint import record, shapes, state


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as saves:
        for step in (3, 5):
            saves.save(step, state(step) | {"opt_state": state(step)["params"]}, record(step))
    return directory


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_seal_is_what_sha256sum_checks(saved):
    checked = subprocess.run(["sha256sum", "-c", seal.NAME], cwd=saved / "5", capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    listed = {line.split("  ")[1] for line in (saved / "5" / seal.NAME).read_text().splitlines()}
    found = {path.relative_to(saved / "5").as_posix() for path in (saved / "5").rglob("*") if path.is_file()}
    assert found - listed == {seal.NAME, *seal.LATE}


def test_every_flipped_bit_every_cut_and_every_missing_file_is_seen(saved, tmp_path):
    """Of each file of a checkpoint in turn, but the two that Orbax writes last."""
    copy = tmp_path / "copy" / "5"  # a step that lies under another name is damage too
    for path in files(saved / "5"):
        if path.name in seal.LATE and path.parent == saved / "5":
            continue
        for harm in (flip, lambda p: p.write_bytes(p.read_bytes()[:-2]), lambda p: p.unlink()):
            shutil.copytree(saved / "5", copy)
            harm(copy / path.relative_to(saved / "5"))
            if path.name == seal.NAME and not (copy / seal.NAME).exists():
                assert sound.damage(copy) is None  # the data are whole: read instead
            else:
                assert sound.damage(copy), path
            shutil.rmtree(copy)
    assert sound.damage(saved / "5") is None


def test_the_newest_sound_checkpoint_is_found_and_nothing_is_deleted(saved, caplog):
    broken = next(path for path in files(saved / "5") if "/d/" in str(path))
    flip(broken)
    sound.mend(saved)
    with Checkpoints(saved) as saves:
        assert saves.steps() == [3]
        saves.save(5, state(5) | {"opt_state": state(5)["params"]}, record(5))  # its place is free again
    (aside,) = (saved.parent / "damaged").iterdir()
    assert aside.name.startswith("5-") and (aside / broken.relative_to(saved / "5")).exists()
    assert f"5: {broken.relative_to(saved / '5')} is not what was written" in caplog.text


def test_what_cannot_be_read_back_is_not_sealed(saved, monkeypatch):
    names = {"params": {"embedding", "layers.0.w"}, "step": {"value"}}
    sound.prove(saved / "5", names)
    with pytest.raises(RunError, match=r"cannot be read back: params has no head, layers\.1\.w"):
        sound.prove(saved / "5", {"params": names["params"] | {"head", "layers.1.w"}})
    monkeypatch.setattr(sound, "prove", lambda path, names: (_ for _ in ()).throw(RunError("not read back")))
    with pytest.raises(RunError, match="not read back"), Checkpoints(saved) as saves:
        saves.save(7, state(7), record(7))
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["3", "5"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"skipped": [0, 0]}, None),
        ({"skipped": [2, 0], "step": 7}, None),
        ({"step": 7, "config": {"stages": {"one": {}}}, "skipped": [0, 0]}, None),
        ({"skipped": [1, 0]}, "says step 5, its arrays 5"),
        ({"skipped": [1]}, "must be two counts"),
        ({"step": 1 << 33, "config": {"stages": {"one": {}}}}, "says step 8589934592"),
        ({"skipped": [0, 0], "step": 6}, "says step 6, its arrays 5"),
        ({"step": 4}, "says step 4, its arrays 5"),
        ({"step": "5"}, "says step 5"),
        ({"step": (1 << 33) + 5, "skipped": [0, 0]}, "says step 8589934597"),
    ],
)
def test_the_steps_of_the_record_are_those_of_the_arrays(saved, changes, found):
    """Also under a seal that fits: updates made and updates skipped are the steps."""
    at = saved / "5" / "run" / "metadata"
    at.write_text(json.dumps(json.loads(at.read_text()) | changes))
    (saved / "5" / seal.NAME).unlink()
    seal.write(saved / "5")
    said = sound.astray(saved / "5")
    assert said is None if found is None else found in said
    if found:
        sound.mend(saved)
        assert [path.name for path in saved.iterdir() if path.name.isdigit()] == ["3"]


def test_without_a_sound_checkpoint_nothing_is_touched(saved):
    for step in ("3", "5"):
        shutil.rmtree(saved / step / "params")
    with pytest.raises(RunError, match=r"no checkpoint is sound \(5: params.* missing; 3: .* missing\)"):
        sound.mend(saved)
    assert {path.name for path in saved.iterdir()} == {"3", "5"}


@pytest.mark.parametrize("item", sound.ITEMS)
def test_checkpoints_of_older_versions_are_read_whole(saved, item):
    (saved / "5" / seal.NAME).unlink()
    assert sound.damage(saved / "5") is None
    for path in files(saved / "5" / item):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert sound.damage(saved / "5")


def test_damage_is_found_on_every_way_of_reading(saved):
    flip(next(path for path in files(saved / "5") if "/d/" in str(path)))
    with Checkpoints(saved) as saves:
        for read in (
            lambda: saves.record(5),
            lambda: saves.restore(5, {"params": shapes(state(0))["params"]}),
            lambda: saves.open(5, "params", ["embedding"]),
        ):
            with pytest.raises(RunError, match=r"/5: damaged checkpoint: .*; remove that directory"):
                read()
        assert saves.record(3) == record(3)


def test_a_sample_tells_files_apart(tmp_path):
    """By name, size and content; a long file that was trained further differs everywhere."""
    small, long = tmp_path / "small", tmp_path / "long"
    small.write_bytes(bytes(range(256)) * 40)
    long.write_bytes(bytes(3 << 20))
    first = seal.sampled([small, long])
    assert seal.sampled([long, small]) == first and len(first) == 16
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert seal.sampled((tmp_path / "copy").iterdir()) == first
    flip(small)
    assert (other := seal.sampled([small, long])) != first
    long.write_bytes(b"\1" * (3 << 20))
    assert seal.sampled([small, long]) not in (first, other)
    flip(small)
    long.write_bytes(bytes((3 << 20) - 1) + b"\1")  # its very end
    assert seal.sampled([small, long]) not in (first, other)
    long.write_bytes(bytes((3 << 20) + 1))
    assert seal.sampled([small, long]) != first
