"""The local engine against real processes: skipping, failing, retrying, being killed and going on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import grid, local, sweep
from launch.grid import Sweep, axis

ROOT = Path(__file__).parents[1]
FILE = """
from launch.grid import Sweep, axis
def get_sweep():
    heads = {"mixers.full.head_dim": 8, "mixers.gla.num_heads": 2}
    sizes = {"model.d_model": 16, "model.vocab_size": 32, "data.slices": "", "data.num_pairs": 2}
    train = {"train.seq_len": 16, "train.batch_size": 2, "train.steps": STEPS, "eval.batches": 1}
    fields = {"mixer": "full", "log.every_steps": 1, **heads, **sizes, **train}
    axes = [axis("ratio", "pure"), axis("seed", *SEEDS)]
    return Sweep("configs/mqar.py", axes, fields, vmap=VMAP)
"""


def write(path: Path, seeds: tuple[int, ...], steps: int, vmap: bool = False) -> str:
    text = FILE.replace("SEEDS", str(seeds)).replace("STEPS", str(steps)).replace("VMAP", str(vmap))
    path.write_text(text)
    return f"--config={path}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORKER", [sys.executable, str(ROOT / "tests" / "fake_worker.py")])
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_one_bad_run_stops_no_other(fake: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    command = [
        write(tmp_path / "s.py", (0, 13, 66, 1, 2), 8),
        f"--workdir={tmp_path}/w",
        "--engine",
        "jobs=2",
    ]
    assert sweep.main(command) == 1
    shown = capsys.readouterr().out
    assert "failed: pure_seed13: RunError: loss is nan" in shown
    assert "failed: pure_seed66: killed by signal 9: out of memory" in shown
    assert "--retry" in shown and (tmp_path / "w" / "report.html").exists()
    starts = lambda seed: len((tmp_path / "w" / f"pure_seed{seed}" / "starts.txt").read_text().splitlines())
    assert [starts(seed) for seed in (0, 13, 66, 1, 2)] == [1] * 5

    assert sweep.main(command) == 1  # the same again: nothing is left to start, failures are only listed
    assert "2 failed; 0 to start" in capsys.readouterr().out
    assert [starts(seed) for seed in (0, 13, 66, 1, 2)] == [1] * 5

    monkeypatch.setenv("FIXED", "1")
    assert sweep.main([*command, "--retry"]) == 0
    assert [starts(seed) for seed in (0, 13, 66, 1, 2)] == [1, 2, 2, 1, 1]
    assert "5 finished; 0 to start" not in capsys.readouterr().out
    assert sweep.main(command) == 0
    assert "5 finished; 0 to start" in capsys.readouterr().out


DRIVER = """
import sys
from launch import local, sweep
local.WORKER, local.POLL_SECONDS = [sys.executable, "tests/fake_worker.py"], 0.02
sys.exit(sweep.main(sys.argv[1:]))
"""


def test_killed_sweep_leaves_no_orphans_and_continues(tmp_path: Path):
    """kill -9 of the sweep: its workers end, and the same command goes on from what they had written."""
    command = [write(tmp_path / "s.py", (0, 1, 2), 150), f"--workdir={tmp_path}/w", "--engine", "jobs=2"]
    arguments = [sys.executable, "-c", DRIVER, *command]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "w" / "pure_seed0" / "metrics.jsonl"
    give_up = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
        assert time.monotonic() < give_up and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.5)
    written = len(metrics.read_text().splitlines())
    time.sleep(0.3)
    assert len(metrics.read_text().splitlines()) == written < 150  # nobody writes any more

    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    starts = (tmp_path / "w" / "pure_seed0" / "starts.txt").read_text().splitlines()
    assert len(starts) == 2 and int(starts[1].split()[1]) > 20  # went on, not anew
    assert len(metrics.read_text().splitlines()) == 150
    assert (tmp_path / "w" / "report.html").exists()


def test_two_sweeps_in_one_folder(fake: None, tmp_path: Path, capsys):
    import fcntl

    (tmp_path / "w").mkdir()
    with (tmp_path / "w" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep.main([write(tmp_path / "s.py", (0,), 5), f"--workdir={tmp_path}/w"]) == 2
    assert "another sweep is running there" in capsys.readouterr().err


def test_time_limit(fake: None, tmp_path: Path, capsys):
    command = [write(tmp_path / "s.py", (0, 1), 5000), f"--workdir={tmp_path}/w"]
    assert sweep.main([*command, "--engine", "jobs=1", "--engine", "seconds=0.5"]) == 1
    assert "written: " in capsys.readouterr().out


def test_runs_that_differ_in_seed_and_rate_are_one_job(tmp_path: Path):
    base = {"mixer": "gla", "model.d_model": 64, "mixers.full.head_dim": 16}
    axes = [axis("ratio", "pure", "1:1"), axis("learning_rate", 1e-3, 1e-2), axis("seed", 0, 1)]
    runs = grid.runs(Sweep("configs/mqar.py", axes, base))
    assert [len(job.runs) for job in local.jobs(runs, tmp_path, vmap=True)] == [4, 4]
    assert [len(job.runs) for job in local.jobs(runs, tmp_path, vmap=False)] == [1] * 8


SHOW = "echo on $CUDA_VISIBLE_DEVICES with $XLA_PYTHON_CLIENT_MEM_FRACTION of its memory"


def test_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in of the client, and what a job on the second GPU is given."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, 81559\\n1, 81559\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [device.gpu for device in local.devices()] == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (device,) = local.devices()
    assert device == local.Device(1, 81559 << 20)
    monkeypatch.setattr(local, "WORKER", ["sh", "-c", SHOW, "--"])
    runs = grid.runs(Sweep("configs/mqar.py", [axis("seed", 0)]))
    (tmp_path / "seed0").mkdir()
    (job,) = local.jobs(runs, tmp_path, vmap=False)
    job.start(device, per_device=3)
    assert job.process is not None and job.process.wait(10) == 0
    job.log.join(10)
    assert (tmp_path / "seed0" / "log.txt").read_text() == "on 1 with 0.30 of its memory\n"
    assert 1 <= local.fitting([job], [device]) <= local.MOST_JOBS


def test_the_real_worker(tmp_path: Path, capsys):
    """Two seeds in one program, and the report; the process ends as one that finished."""
    command = [write(tmp_path / "s.py", (0, 1), 6, vmap=True), f"--workdir={tmp_path}/w"]
    assert sweep.main(command) == 0, (tmp_path / "w" / "pure_seed0" / "log.txt").read_text()
    for seed in (0, 1):
        folder = tmp_path / "w" / f"pure_seed{seed}"
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
        assert {"config.json", "layers.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert "Fatal" not in (tmp_path / "w" / "pure_seed0" / "log.txt").read_text()
    assert (tmp_path / "w" / "report.html").exists()
