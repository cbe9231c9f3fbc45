"""Every command has a help without extras; a module that is no command names those that are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm import commands

ROOT = Path(__file__).parents[1]


def ran(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


OURS = [command for command in commands.COMMANDS if "eval" not in command and "launch" not in command]


@pytest.mark.parametrize("command", [OURS[0], *(pytest.param(c, marks=pytest.mark.once) for c in OURS[1:])])
def test_help(command):
    done = ran(*command.split()[1:], "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr


@pytest.mark.parametrize("module", ["hybridlm.pattern", "hybridlm.data.text", "hybridlm.mixers"])
def test_a_module_that_is_no_command(module):
    done = ran("-Wd", "-m", module, "hybridlm.generate")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"{module} is no command.") and "python -m hybridlm.generate" in done.stderr


def test_any_command_from_anywhere(tmp_path, monkeypatch):
    """By its module, with what it is given; a wheel's list says so of what only a clone has a name for."""
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "hybridlm", *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    done = run("eval.compare", "a", "b")
    assert done.returncode == 2 and "runs = 'a': holds no eval.json" in done.stderr + done.stdout
    for words, said in (
        ((), "python -m hybridlm COMMAND ... runs one"),
        (("eval.x",), "eval.x is no command"),
    ):
        done = run(*words)
        assert done.returncode == 2 and said in done.stderr and "python -m launch.report" in done.stderr
    monkeypatch.setattr(commands, "root", lambda: tmp_path / "rooms")
    for line in commands.listing().splitlines():
        assert line.startswith("  python -m hybridlm")
    assert "python -m hybridlm launch.report " in commands.listing()


def test_an_import_says_nothing():
    assert (
        ran("-c", "import sys; sys.argv[0] = '-'; import hybridlm.pattern; print('fine')").stdout == "fine\n"
    )
