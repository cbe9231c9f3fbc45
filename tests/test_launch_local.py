"""The local engine against real processes: skipping, failing, retrying, being killed and going on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from hybridlm import trainer, untrusted
from hybridlm.run.lock import Lock
from launch import grid, local, plan, state, sweep
from launch.grid import Sweep, axis
from launch.view import View

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


@pytest.mark.once
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


def test_killed_between_the_last_line_and_the_last_checkpoint(
    fake: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """All lines of metrics, no checkpoint: not finished, and trained on."""
    command = [write(tmp_path / "s.py", (77, 1), 8), f"--workdir={tmp_path}/w"]
    assert sweep.main(command) == 1
    assert "failed: pure_seed77: killed by signal 9" in capsys.readouterr().out
    folder = tmp_path / "w" / "pure_seed77"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
    (folder / "error.txt").unlink()  # as when the whole sweep is killed there
    assert state.status(folder, 8).state == "queued"
    monkeypatch.setenv("FIXED", "1")
    assert sweep.main(command) == 0
    assert len((folder / "starts.txt").read_text().splitlines()) == 2
    assert state.status(folder, 8).state == "finished"
    assert state.sealed(folder / "checkpoints" / "8")


@pytest.mark.parametrize("name", ["a b", "$(touch INTRUDER)", "a\nb", "-x", "a[/b] $_{x$", "r[1]", "ä", "*"])
@pytest.mark.once
def test_awkward_folders(name: str, fake: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Nothing of the name is read as more than a name; what is shown of it is text on one line."""
    monkeypatch.chdir(tmp_path)
    text = FILE.replace("configs/mqar.py", str(ROOT / "configs/mqar.py"))
    text = text.replace("SEEDS", "(0,)").replace("STEPS", "2").replace("VMAP", "False")
    (tmp_path / "s.py").write_text(text)
    assert sweep.main([f"--config={tmp_path}/s.py", f"--workdir={name}"]) == 0
    shown = capsys.readouterr().out
    assert "written: " in shown.splitlines()[-1] and (tmp_path / name / "report.html").exists()
    assert state.status(tmp_path / name / "pure_seed0", 2).state == "finished"
    assert not list(tmp_path.rglob("INTRUDER"))


@pytest.mark.once
def test_home_is_in_no_file(fake: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home" / "jane"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jane")
    monkeypatch.setenv("LOGNAME", "jane")
    text = FILE.replace("SEEDS", "(0, 66, 13)").replace("STEPS", "6").replace("VMAP", "False")
    axes = f'axes = [axis("where", here={{"eval.sample_prompt": "{home}/a"}}), axis("data.kind", "mqar"), '
    text = text.replace("axes = [", axes).replace('"configs/', f'"{ROOT}/configs/')
    (home / "s.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["sweep", f"--config={home}/s.py"])
    assert sweep.main([f"--config={home}/s.py", f"--workdir={home}/w"]) == 1
    shown = capsys.readouterr().out
    written = [path for path in (home / "w").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"report.html", "sweep.json", "results.csv", "error.txt", "log.txt", "point.json"} <= names
    for path in written:
        if path.name not in ("starts.txt", "point.json"):
            assert str(home).encode() not in path.read_bytes(), path
    assert str(home) not in shown


@pytest.mark.once
def test_a_disk_that_is_full_or_read_only(
    fake: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """At the start, and at the end: one line, exit code 1, what is there is kept."""
    command = [write(tmp_path / "s.py", (0,), 3), f"--workdir={tmp_path}/w"]
    kept = untrusted.write_bytes

    def refuses(name: str):
        def write_bytes(path, content):
            if Path(path).name == name:
                raise OSError(30, "Read-only file system", str(path))
            kept(path, content)

        return write_bytes

    for name in ("sweep.json", "report.html"):
        monkeypatch.setattr(untrusted, "write_bytes", refuses(name))
        assert sweep.main(command) == 1
        message = capsys.readouterr().err
        assert (
            message.startswith("error: ") and message.count("\n") == 1 and "Read-only file system" in message
        )
        assert "Traceback" not in message
    monkeypatch.setattr(untrusted, "write_bytes", kept)
    assert state.status(tmp_path / "w" / "pure_seed0", 3).state == "finished"
    assert sweep.main(command) == 0


WRITER = """
import sys
from pathlib import Path
from launch import grid, machine, plan
from launch.grid import Sweep, axis
workdir = Path(sys.argv[1])
runs = grid.runs(Sweep("configs/mqar.py", [axis("seed", *range(8))]))
print("ready", flush=True)
while True:
    plan.write(runs, workdir, {"command": "x" * 200_000})
    machine.note([workdir / "seed0"], {"device": "y" * 200_000})
"""


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path):
    """kill -9 at any moment leaves each small file as it was before or as it was to be."""
    for delay in (0.0, 0.03, 0.1, 0.17):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        give_up = time.monotonic() + 60
        while not (tmp_path / "seed0" / "machine.json").exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        for path in (
            tmp_path / "sweep.json",
            *tmp_path.glob("seed*/point.json"),
            *tmp_path.glob("seed*/machine.json"),
        ):
            json.loads(path.read_text())
    plan.write(grid.runs(Sweep("configs/mqar.py", [axis("seed", *range(8))])), tmp_path, {})


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 9999, "\udcff"])
def test_a_damaged_point_is_written_anew(damage: str, tmp_path: Path):
    runs = grid.runs(Sweep("configs/mqar.py", [axis("seed", 0)]))
    plan.write(runs, tmp_path, {})
    whole = (tmp_path / "seed0" / "point.json").read_text()
    (tmp_path / "seed0" / "point.json").write_text(damage, errors="surrogateescape")
    plan.write(runs, tmp_path, {})
    assert (tmp_path / "seed0" / "point.json").read_text() == whole


DRIVER = """
import sys
from launch import local, sweep
local.WORKER, local.POLL_SECONDS = [sys.executable, "tests/fake_worker.py"], 0.02
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.mark.once
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
    with Lock(tmp_path / "w"):
        assert sweep.main([write(tmp_path / "s.py", (0,), 5), f"--workdir={tmp_path}/w"]) == 2
    assert "is in use by process" in capsys.readouterr().err


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
    for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert [device.gpu for device in local.devices()] == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (device,) = local.devices()
    assert device == local.Device(1, 81559 << 20)
    for said, found in (("has failed: no driver", None), ("1, [N/A]", 1)):
        smi.write_text(f"#!/bin/sh\necho '{said}'\nexit 9\n")
        assert local.devices() == [local.Device(found, None)]
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
        assert state.sealed(folder / "checkpoints" / "6")
        (start,) = state.starts(folder)
        assert (start["together"], start["processes"]) == (2, 1) and start["commit"] and start["date"]
    assert "tokens/s" not in (tmp_path / "w" / "report.html").read_text()  # of two in one program
    assert "Fatal" not in (tmp_path / "w" / "pure_seed0" / "log.txt").read_text()
    assert (tmp_path / "w" / "report.html").exists()


@pytest.mark.once
def test_data_that_changed_between_runs_are_said(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 40)
    fields = {
        "mixer": "full",
        "ratio": "pure",
        "mixers.full.head_dim": 8,
        "model.d_model": 16,
        "model.num_layers": 1,
    }
    fields |= {"model.vocab_size": 260, "data.kind": "text", "data.path": str(text), "train.seq_len": 16}
    fields |= {"train.batch_size": 2, "train.steps": 1, "eval.batches": 1}
    runs = grid.runs(Sweep("configs/mqar.py", [axis("seed", 0, 1)], fields))
    assert plan.other_data(runs, tmp_path) == []
    trainer.train(runs[0].config, tmp_path / runs[0].name)
    assert plan.other_data(runs, tmp_path) == []
    text.write_text("another line of text\n" * 40)
    assert plan.other_data(runs, tmp_path) == [runs[0].name]
    assert plan.other_data(runs[:1], tmp_path) == []  # nothing is left to train
    text.unlink()
    assert plan.other_data(runs, tmp_path) == []


@pytest.mark.slow
def test_the_real_worker_trains_on_without_its_last_checkpoint(tmp_path: Path):
    """As a kill between the last line and the final save leaves it."""
    text = write(tmp_path / "s.py", (0,), 6)
    arguments = [text, f"--workdir={tmp_path}/w", "--config.checkpoint.every_steps=2"]
    assert sweep.main(arguments) == 0
    folder = tmp_path / "w" / "pure_seed0"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder / "checkpoints" / "6")
    assert state.status(folder, 6).state == "queued"
    assert sweep.main(arguments) == 0
    assert state.sealed(folder / "checkpoints" / "6") and len(state.starts(folder)) == 2
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in again] == [json.loads(line)["loss"] for line in lines]


def test_the_live_table_says_whose_speed_it_is(tmp_path: Path):
    runs = grid.runs(Sweep("configs/mqar.py", [axis("seed", 0, 1)]))
    for run, packed in zip(runs, (2, 1), strict=True):
        (tmp_path / run.name).mkdir()
        line = {"step": 1, "loss": None, "tokens_per_second": 1000.0, "packed": packed}
        (tmp_path / run.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    console = Console(record=True, width=120)
    console.print(View(runs, tmp_path, console).table(runs))
    _, first, second = [line for line in console.export_text().splitlines() if "s" in line]
    assert "1,000 of 2 together" in first and "together" not in second and "not finite" in second
