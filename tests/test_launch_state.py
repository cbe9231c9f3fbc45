"""What lies in a run's folder, and what a worker notes there."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from hybridlm.run import seal
from launch import machine, state
from tests.sweep_files import seal_run, write

ROOT = Path(__file__).parents[1]


def test_a_run_is_finished_when_its_last_checkpoint_is_sealed(tmp_path: Path):
    write(tmp_path)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert state.status(tmp_path / "full", 20).state == "finished"
    (checkpoints / "20" / "array").unlink()  # cut short
    assert state.status(tmp_path / "full", 20).state == "queued"
    assert state.status(tmp_path / "full", 20, sealed_runs=False).state == "finished"
    shutil.rmtree(checkpoints / "20")
    assert state.status(tmp_path / "full", 20).state == "queued"
    seal_run(tmp_path / "full", 10)  # of an earlier step
    assert state.status(tmp_path / "full", 20).state == "queued"
    (checkpoints / "20.orbax-checkpoint-tmp").mkdir()
    assert state.status(tmp_path / "full", 20).state == "queued"
    seal_run(tmp_path / "full", 20)
    (checkpoints / "20" / seal.NAME).write_text("")
    assert state.status(tmp_path / "full", 20).state == "queued"


def test_a_seal_that_lists_files_elsewhere_is_none(tmp_path: Path):
    (tmp_path / "outside").write_text("x")
    for name in ("../outside", "/etc/hostname", "missing", ""):
        folder = tmp_path / "run" / "checkpoints" / "20"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / seal.NAME).write_text(f"{'0' * 64}  {name}\n")
        assert not state.sealed(folder)


def test_starts_are_kept_and_tell_whether_a_speed_is_its_own(tmp_path: Path):
    alone, shared = (machine.start("device", "0.11", count, 1) for count in (1, 2))
    for one, verdict in ((alone, True), (alone, True), (shared, False), (alone, False)):
        machine.note([tmp_path], one)
        assert machine.alone(state.starts(tmp_path)) is verdict
    assert len(state.starts(tmp_path)) == 4
    assert not machine.alone([]) and not machine.alone([machine.start("device", "0.11", 1, 2)])
    for damage in ("", "[]", '{"starts": 1}', '{"starts": [1]}', "[" * 9999):
        (tmp_path / "machine.json").write_text(damage)
        assert state.starts(tmp_path) == []
    machine.note([tmp_path], alone)
    assert json.loads((tmp_path / "machine.json").read_text()) == {"starts": [alone]}


def test_commit_is_this_codes():
    """Of the clone that the code is in; of no other repository that its folder may lie in."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    assert machine.commit().rstrip("+") == done.stdout.strip()


def test_the_last_line_of_a_long_text(tmp_path: Path):
    (tmp_path / "log.txt").write_bytes(b"x" * 1_000_000 + b"\n\xff\x1b[2Jlast\n\n")
    shown = state.last_line(tmp_path, "log.txt")
    assert shown.endswith("last") and shown.isprintable()
    assert state.last_line(tmp_path, "none.txt") == ""
