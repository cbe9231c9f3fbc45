"""Exit codes and last lines of commands, as docs and launchers rely on them."""

import os
import subprocess
import sys

import pytest

from hybridlm.errors import ConfigError, RunError, Stopped
from hybridlm.run import cli


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ConfigError("train.steps", 0, "must be positive", "Give more."),
            2,
            "error: train.steps = 0: must be",
        ),
        (RunError("disk full"), 1, "error: disk full"),
        (Stopped("stopped at step 3"), 3, "stopped at step 3; start again with --resume=auto"),
        (KeyboardInterrupt(), 130, "interrupted: all is kept"),
    ],
)
def test_an_expected_end_is_one_line(error, code, message, capsys):
    def body() -> None:
        raise error

    assert cli.run(body, "all is kept") == code
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1


def test_an_error_of_the_program_shows_where(capsys):
    assert cli.run(lambda: 1 // 0) == 1
    printed = capsys.readouterr().err
    assert "test_cli.py" in printed and printed.endswith(
        "\nerror: ZeroDivisionError: integer division or modulo by zero\n"
    )


def test_a_platform_that_jax_has_not_is_one_line():
    code = "import jax, sys; from hybridlm.run import cli; sys.exit(cli.run(lambda: jax.devices()))"
    environment = os.environ | {"JAX_PLATFORMS": "wrong"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: JAX_PLATFORMS = 'wrong': Unable to initialize backend 'wrong'")


def test_the_body_gives_the_code_of_a_finished_command(capsys):
    assert cli.run(lambda: None) == 0 and cli.run(lambda: 4) == 4
    assert capsys.readouterr().err == ""


def test_the_home_directory_is_not_printed(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")

    def body() -> None:
        raise RunError("/home/ada/runs/x is full")

    cli.run(body)
    assert capsys.readouterr().err == "error: ~/runs/x is full\n"


ONE_OF_MANY_WRITES_FAILS = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from hybridlm.run import cli
from hybridlm.run.checkpoint import Checkpoints
from tests.test_checkpoint import record

def body():
    with Checkpoints(Path(sys.argv[1])) as saves:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))
        saves.save(5, {"params": {str(i): jnp.arange(1 << 16) for i in range(40)}}, record(5))

sys.exit(cli.run(body))
"""


def test_a_failed_save_is_one_line(tmp_path):
    """Without `ignore_abandoned_writes` some 35 tracebacks of Orbax's other writes come with it.

    The folder outlives the process: those writes may still make files there.
    """
    script = [sys.executable, "-c", ONE_OF_MANY_WRITES_FAILS, str(tmp_path)]
    ended = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "could not be written" in ended.stderr
    assert "Traceback" not in ended.stderr
