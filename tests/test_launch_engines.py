"""Job files, and submission through stand-ins of the clients: submitit a module, the others commands."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from hybridlm import config as configs
from hybridlm.errors import ConfigError, RunError
from launch import engines, grid, local, plan, skypilot, slurm, sweep, wandb_sweep, xpk
from launch.grid import Sweep, axis
from train import default_workdir, parse

SWEEP = """
from launch.grid import Sweep, axis
def get_sweep():
    return Sweep("configs/quickstart.py", [axis("seed", 0)])
"""


@pytest.fixture(scope="module")
def runs():
    axes = [axis("mixer", "gla", "hgrn2"), axis("ratio", "3:1", "pure")]
    return grid.runs(Sweep("configs/hybrid.py:340m,{mixer},{ratio}", axes, tokens=20e9))


@pytest.fixture
def jobs(runs, tmp_path: Path):
    workdir = tmp_path / "grid"
    workdir.mkdir()
    plan.write(runs, workdir, {})
    return local.jobs(runs, workdir, vmap=False)


def client(path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that notes its arguments, one JSON list a call, then runs ``text``."""
    calls = path / f"{name}.calls"
    note = f"import json, sys; open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    (path / name).write_text(f'#!/bin/sh\n{shlex.join([sys.executable, "-c", note])} "$@"\n{text}\n')
    (path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    return calls


def read(calls: Path) -> list[list[str]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_settings():
    assert engines.settings(slurm.Settings, ["gpus=4", "partition=a"]) == slurm.Settings(
        gpus=4, partition="a"
    )
    for given, part in (
        (["gpu=4"], "Did you mean 'gpus'"),
        (["gpus=0"], "at least 1"),
        (["gpus"], "KEY=VALUE"),
    ):
        with pytest.raises(ConfigError, match=part):
            engines.settings(slurm.Settings, given)
    with pytest.raises(ConfigError, match="--engine cluster"):
        engines.settings(xpk.Settings, ["image=x"])


def test_kubernetes_names_are_short_legal_and_distinct():
    names = [engines.kubernetes_name(f"kda_3-1_learning_rate0.0007_seed{i}_0-1", 39) for i in range(20)]
    assert len(set(names)) == 20 and all(len(name) <= 39 for name in names)
    assert engines.kubernetes_name("3-1_Pure", 39) == "run-3-1-pure"


# SLURM


def test_slurm_script_is_an_array_of_the_runs(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script is run by a shell as SLURM would, with stand-ins of srun and scontrol."""
    workdir = tmp_path / "grid"
    script, listed = slurm.write(jobs, workdir, slurm.Settings(nodes=2, gpus=4, parallel=3, partition="long"))
    text = script.read_text()
    assert "#SBATCH --array=0-3%3\n" in text and "#SBATCH --partition=long\n" in text
    assert "#SBATCH --requeue\n" in text and "#SBATCH --signal=USR1@300\n" in text
    assert len(listed.read_text().splitlines()) == 4
    srun = client(tmp_path, "srun", "ls ${PYTHONPATH%%:*}/launch/worker.py; exit $STOP", monkeypatch)
    scontrol = client(tmp_path, "scontrol", "", monkeypatch)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    run = subprocess.run(["bash", script], env={**task, "STOP": "1"}, check=False, capture_output=True)
    assert run.returncode == 1 and b"worker.py" in run.stdout
    folder = str(workdir / "hgrn2_3-1")
    assert read(srun) == [["python", "-m", "launch.worker", "--distributed", "--", folder]]
    assert f"#SBATCH --output={workdir}/slurm_%A_%a.log\n" in text
    assert not scontrol.exists()
    assert subprocess.run(["bash", script], env={**task, "STOP": "3"}, check=False).returncode == 0
    assert read(scontrol) == [["requeue", "7_2"]]


def test_submitit_gets_an_array(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict = {}

    class AutoExecutor:
        def __init__(self, folder, cluster):
            seen["cluster"] = cluster

        def update_parameters(self, **parameters):
            seen.update(parameters)

        def map_array(self, function, arguments):
            seen["folders"] = [Path(folder).name for (folder,) in arguments]
            seen["task"] = function
            return [types.SimpleNamespace(job_id=f"9_{i}") for i in range(len(arguments))]

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    settings = slurm.Settings(gpus=1, minutes=30, parallel=2, account="lab")
    assert slurm.submit(jobs, tmp_path, settings) == ["9_0", "9_1", "9_2", "9_3"]
    assert seen["folders"] == ["gla_3-1", "gla_pure", "hgrn2_3-1", "hgrn2_pure"]
    assert (seen["timeout_min"], seen["slurm_array_parallelism"], seen["slurm_account"]) == (30, 2, "lab")
    assert "slurm_partition" not in seen and not seen["task"].distributed


@pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="needs the launch extra (submitit)")
def test_submitit_runs_a_task_and_requeues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """submitit's own local executor, with a stand-in for the worker that trains."""
    import submitit

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    executor = submitit.AutoExecutor(folder=tmp_path / "log", cluster="local")
    executor.update_parameters(timeout_min=1)
    job = executor.map_array(slurm.Task(distributed=False), [["no-such-folder"]])[0]
    assert job.result() != 0  # the worker ran, and refused a folder that is not there
    again = slurm.Task(False).checkpoint(["a"])
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.args == (["a"],)


def test_slurm_settings_are_words(jobs, tmp_path: Path):
    for value in ("a\n#SBATCH --wrap=touch x", "a b", "a;'", "a#b"):
        with pytest.raises(ConfigError, match="--engine qos"):
            slurm.write(jobs, tmp_path / "grid", slurm.Settings(qos=value))
    slurm.write(jobs, tmp_path / "grid", slurm.Settings(constraint="a100&(ib|roce)*2"))


# SkyPilot, xpk


def test_skypilot_task_and_one_managed_job_a_run(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = skypilot.Settings(accelerators="A100:4", nodes=2, bucket="b")
    path, script = skypilot.write(jobs, tmp_path / "grid", settings)
    task = yaml.safe_load(path.read_text())
    assert task["resources"] == {"accelerators": "A100:4", "use_spot": True} and task["num_nodes"] == 2
    calls = client(tmp_path, "sky", "", monkeypatch)
    assert skypilot.missing(settings) == ""
    skypilot.submit(jobs, tmp_path / "grid", settings)
    by_hand = read(calls)
    calls.unlink()
    subprocess.run(["bash", script], check=True)
    assert read(calls) == by_hand and len(by_hand) == 4
    assert by_hand[0][:2] == ["jobs", "launch"] and by_hand[0][-1] == str(path)
    environment = dict(word.split("=", 1) for word in by_hand[2] if word.startswith(("RUN=", "ARGUMENTS=")))
    python = client(tmp_path, "python", "", monkeypatch)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    subprocess.run(["bash", "-c", task["run"]], env={**os.environ, **environment, **given}, check=True)
    (words,) = read(python)
    assert words[0] == "train.py" and words[-1] == "--distributed=10.0.0.1:8476,2,1"
    trains(words[1:], jobs[2].runs[0], "/runs/grid/hgrn2_3-1")


def test_xpk_workload_a_run(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = xpk.Settings(cluster="c", image="i", type="v5p-16", count=2)
    (script,) = xpk.write(jobs, tmp_path / "grid", settings)
    calls = client(tmp_path, "xpk", "", monkeypatch)
    subprocess.run(["bash", script], check=True)
    first = read(calls)
    calls.unlink()
    assert xpk.submit(jobs, tmp_path / "grid", settings)[0] == "gla-3-1"
    assert read(calls) == first and len(first) == 4
    flags = dict(zip(first[0][2::2], first[0][3::2], strict=True))
    assert (flags["--tpu-type"], flags["--num-slices"], flags["--cluster"]) == ("v5p-16", "2", "c")
    words = shlex.split(flags["--command"])
    assert words[:2] == ["python", "train.py"]
    trains(words[2:], jobs[0].runs[0], "/runs/grid/gla_3-1")
    client(tmp_path, "xpk", "echo 'no quota' >&2; exit 1", monkeypatch)
    with pytest.raises(RunError, match="xpk refused gla_3-1: no quota"):
        xpk.submit(jobs, tmp_path / "grid", settings)


def trains(words: list[str], run: grid.Run, workdir: str) -> None:
    """That train.py, given these arguments, does ``run``."""
    flags, overrides = parse(words)
    assert configs.resolve(configs.load(flags.config, overrides)) == run.config
    assert flags.workdir == workdir


# W&B


def test_wandb_agents_are_given_train_commands(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an agent runs, macros put in as W&B documents them, is the run in its own folder."""
    (path,) = wandb_sweep.write(jobs, tmp_path / "grid", wandb_sweep.Settings(project="p"))
    written = yaml.safe_load(path.read_text())
    assert written["method"] == "grid" and written["metric"] == {"name": "val_loss", "goal": "minimize"}
    (config,) = (value for value in written["parameters"]["config"]["values"] if "hgrn2_pure" in value)
    macros = {
        "${env}": ["/usr/bin/env"],
        "${program}": [written["program"]],
        "${args}": [f"--config={config}"],
    }
    words = [word for part in written["command"] for word in macros.get(part, [part])]
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    flags, overrides = parse(words[3:])
    assert default_workdir(flags.config) == tmp_path / "grid" / "hgrn2_pure"
    expected = jobs[3].runs[0].config.to_dict()
    expected["log"] |= {"wandb_mode": "online", "project": "p"}
    assert configs.resolve(configs.load(flags.config, overrides)).to_dict() == expected
    client(tmp_path, "wandb", "echo 'wandb: Run sweep agent with: wandb agent me/p/abc12' >&2", monkeypatch)
    assert wandb_sweep.submit(jobs, tmp_path / "grid", wandb_sweep.Settings()) == ["me/p/abc12"]


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("slurm", "submitit is not installed|no sbatch"),
        ("skypilot", "`sky` is not installed"),
        ("xpk", "`xpk` is not"),
        ("wandb", "no W&B key"),
    ],
)
def test_without_a_client_the_files_are_written(
    launcher: str, reason: str, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    settings = ["--engine", "cluster=c", "--engine", "image=i"] if launcher == "xpk" else []
    (tmp_path / "s.py").write_text(SWEEP)
    assert (
        sweep.main(
            [f"--config={tmp_path}/s.py", f"--workdir={tmp_path}/g", f"--launcher={launcher}", *settings]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "written: " in shown and re.search(f"not submitted: .*({reason})", shown)


# Names that a shell would read something into

AWKWARD = [
    "a b", "$(touch INTRUDER)", "`touch INTRUDER`", "a\nb; touch INTRUDER", "a';touch INTRUDER;'", "-x", "~",
    '"$HOME"', "a&b|c>d", "a\\", "#a", "a*[b]?", "!a", "a\ttouch", "ä\u2028b", "%A{x}", "a=b",
]  # fmt: skip


@pytest.fixture(params=AWKWARD, ids=[f"name{i}" for i in range(len(AWKWARD))])
def awkward(request, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(jobs, workdir) in a folder of that name, with an axis' value of that text; commands run beside it."""
    text = request.param
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    workdir = Path(text)
    workdir.mkdir()
    fields = {"eval.sample_prompt": text}
    config = configs.resolve(configs.load(str(ROOT / "configs/quickstart.py"), fields))
    chosen = [grid.Run("seed0", {}, str(ROOT / "configs/quickstart.py"), fields, config)]
    yield [local.Job(chosen, workdir)], workdir
    assert not list(tmp_path.rglob("INTRUDER*"))


ROOT = Path(__file__).parents[1]


def test_slurm_scripts_of_awkward_names(awkward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs, workdir = awkward
    script, _ = slurm.write(jobs, workdir, slurm.Settings(gpus=1))
    for line in script.read_text().splitlines():
        assert not line.startswith("#SBATCH") or re.fullmatch(r"#SBATCH --[\w-]+(=[\w./%@+=-]+)?", line)
    assert len(re.findall("^workdir=", script.read_text(), re.MULTILINE)) == 1
    srun = client(tmp_path, "srun", "echo said", monkeypatch)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    subprocess.run(["bash", "--", script], env=task, check=True)
    assert read(srun) == [["python", "-m", "launch.worker", "--", str(workdir / "seed0")]]
    simple = slurm.PLAIN.fullmatch(str(workdir)) is not None
    assert (workdir / "slurm_7_0.log").exists() != simple  # of a simple name sbatch makes the log itself


def test_skypilot_files_of_awkward_names(awkward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs, workdir = awkward
    path, script = skypilot.write(jobs, workdir, skypilot.Settings(nodes=2))
    assert len(script.read_text().splitlines()) == 3
    calls = client(tmp_path, "sky", "", monkeypatch)
    subprocess.run(["bash", "--", script], check=True)
    (words,) = read(calls)
    assert words[-1] == str(path)
    environment = dict(word.split("=", 1) for word in words if word.startswith(("RUN=", "ARGUMENTS=")))
    python = client(tmp_path, "python", "", monkeypatch)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    task = yaml.safe_load(path.read_text())
    subprocess.run(["bash", "-c", task["run"]], env={**os.environ, **environment, **given}, check=True)
    (words,) = read(python)
    assert words[-1] == "--distributed=10.0.0.1:8476,2,1"
    trains(words[1:], jobs[0].runs[0], f"/runs/{workdir.name}/seed0")


def test_xpk_files_of_awkward_names(awkward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The client puts the command into YAML by itself, so it is one line; a shell there takes it apart."""
    jobs, workdir = awkward
    (script,) = xpk.write(jobs, workdir, xpk.Settings(cluster="c", image="i"))
    calls = client(tmp_path, "xpk", "", monkeypatch)
    subprocess.run(["bash", "--", script], check=True)
    (words,) = read(calls)
    command = words[words.index("--command") + 1]
    assert "\n" not in command and command.isprintable()
    python = client(tmp_path, "python", "", monkeypatch)
    subprocess.run(["bash", "-c", command], check=True)
    (words,) = read(python)
    assert words[-1] == "--distributed=auto"
    trains(words[1:], jobs[0].runs[0], f"/runs/{workdir.name}/seed0")


def test_wandb_files_of_awkward_names(awkward):
    jobs, workdir = awkward
    (path,) = wandb_sweep.write(jobs, workdir, wandb_sweep.Settings())
    written = yaml.safe_load(path.read_text())
    assert written["parameters"]["config"]["values"] == [str(workdir / "seed0" / "point.json")]


def test_submitit_is_not_given_what_it_cannot_quote(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace())
    with pytest.raises(ConfigError, match=r"slurm\.sh with sbatch"):
        slurm.submit(jobs, tmp_path / "a\n#SBATCH --x", slurm.Settings())


def test_a_name_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "s.py").write_text(SWEEP)
    assert sweep.main([f"--config={tmp_path}/s.py", f"--workdir={tmp_path}/\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
