"""What a wheel holds: two top-level names, every module, the licence; and that it trains by itself."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders(top: str) -> set[str]:
    found = (ROOT / top).rglob("*.py")
    return {".".join(file.parent.relative_to(ROOT).parts) for file in found}


def test_every_folder_of_code_is_listed():
    """By hand, since setuptools finds packages in one place only."""
    own = folders("hybridlm") | folders("pallas_kernels")
    rooms = {"hybridlm.rooms"} | {
        f"hybridlm.rooms.{x}" for top in ("configs", "eval", "launch") for x in folders(top)
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(own | rooms)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "clone"  # setuptools writes beside its sources
    for name in ("hybridlm", "pallas_kernels", "configs", "eval", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("setuptools cannot be had offline")
    assert not done.returncode, done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.once
def test_names_and_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"hybridlm", "pallas_kernels"}
    modules = {
        str(file.relative_to(ROOT))
        for top in ("hybridlm", "pallas_kernels")
        for file in (ROOT / top).rglob("*.py")
    }
    rooms = {
        f"hybridlm/rooms/{file.relative_to(ROOT)}"
        for top in ("configs", "eval", "launch", "train.py")
        for file in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
    }
    files = {name for name in names if ".dist-info/" not in name}
    assert files == modules | rooms | {"hybridlm/py.typed", "hybridlm/h100.txtpb", "pallas_kernels/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_trains_the_quickstart_and_writes_outside_a_clone(wheel, tmp_path):
    """In an environment that has this one's libraries and the wheel, but not the clone."""
    venv.create(tmp_path / "env", with_pip=False)
    library = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(library)
    others = [path for path in sys.path if path.endswith("site-packages")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = f"import sys; sys.path += {others!r}; from hybridlm import commands; commands."
    python = str(tmp_path / "env" / "bin" / "python")

    def run(command: str, *flags: str) -> str:
        script = own + f"{command}()"
        done = subprocess.run(
            [python, "-c", script, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        return done.stdout

    small = {
        "train.steps": 2,
        "train.seq_len": 64,
        "model.d_model": 64,
        "eval.batches": 1,
        "eval.sample_tokens": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    run("train", "--config=configs/quickstart.py", "--workdir=run", *flags, "--config.mixers.kda.head_dim=16")
    text = run("generate", "--workdir=run", "--prompt=def ", "--max_new_tokens=8")
    assert text.startswith("def ")
    for typed, where in PROJECT["project"]["scripts"].items():
        assert run(where.partition(":")[2], "--help").startswith(f"usage: {typed} ")
