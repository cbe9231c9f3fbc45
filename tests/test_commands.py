"""Every command has a help without extras; a module that is no command names those that are."""

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


@pytest.mark.parametrize("module", ["hybridlm", "hybridlm.pattern", "hybridlm.data.text", "hybridlm.mixers"])
def test_a_module_that_is_no_command(module):
    done = ran("-Wd", "-m", module, "hybridlm.generate")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"{module} is no command.") and "python -m hybridlm.generate" in done.stderr


def test_an_import_says_nothing():
    assert (
        ran("-c", "import sys; sys.argv[0] = '-'; import hybridlm.pattern; print('fine')").stdout == "fine\n"
    )
