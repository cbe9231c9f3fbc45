"""Stops: signals, the wall-clock limit, and a second signal that ends at once."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.errors import Stopped
from hybridlm.run import interrupt
from hybridlm.run.checkpoint import Checkpoints
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny.write_text(tmp_path_factory.mktemp("text"))
    every = {"checkpoint__every_steps": 7, "eval__every_steps": 4, "log__every_steps": 2}
    return configs.resolve(tiny.config(text, train__steps=12, eval__sample_tokens=4, **every))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    trainer.train(config, workdir)
    return tiny.lines(workdir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
@pytest.mark.once
def test_a_signal_stops_at_the_next_step_with_everything_saved(config, whole, tmp_path, number):
    before = [signal.getsignal(one) for one in interrupt.SIGNALS]

    def ask(definition, params, tokenizer, step):
        if step == 4:
            signal.raise_signal(number)  # os.kill may take another thread, which has to be scheduled
        return {}

    with pytest.raises(Stopped, match=rf"stopped by {number.name} with a complete checkpoint at step (5|6)"):
        trainer.train(config, tmp_path, evaluate=ask)
    assert [signal.getsignal(one) for one in interrupt.SIGNALS] == before
    assert tiny.lines(tmp_path) == [line for line in whole if line["step"] <= 5]
    trainer.train(config, tmp_path, resume="must")
    assert tiny.lines(tmp_path) == whole


@pytest.mark.slow
def test_a_time_limit_stops_a_line_that_is_due_is_written_on_resumption(config, whole, tmp_path, monkeypatch):
    """The limit falls on a step with validation, which the resumed run makes up for."""
    monkeypatch.setattr(interrupt.Stop, "asked", lambda stop: interrupt.TIME_LIMIT * (clock[0] >= 8))
    clock, put = [0], trainer.sharding.put_batch

    def counted(*args):
        clock[0] += 1
        return put(*args)

    monkeypatch.setattr(trainer.sharding, "put_batch", counted)
    while True:
        clock[0] = 0
        try:
            trainer.train(config, tmp_path)
            break
        except Stopped as stopped:
            assert "time limit train.max_minutes with a complete checkpoint" in str(stopped)
        with Checkpoints(tmp_path / "checkpoints") as saves:
            newest = saves.steps()[-1]
            assert saves.record(newest)["step"] == newest
    assert tiny.lines(tmp_path) == whole


@pytest.mark.once
def test_a_line_left_to_the_resumption_is_written_once(config, whole, tmp_path, monkeypatch):
    """Stopped before the line of step 8; the resumption wrote it, and was killed before it saved anything."""
    asked = iter([0] * 8 + [interrupt.TIME_LIMIT])  # once before the first step, then after each
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="complete checkpoint at step 8"):
        patch.setattr(interrupt.Stop, "asked", lambda stop: next(asked))
        trainer.train(config, tmp_path)
    assert tiny.lines(tmp_path) == [line for line in whole if line["step"] < 8]
    written = [json.dumps(line) + "\n" for line in whole if line["step"] <= 10]
    (tmp_path / "metrics.jsonl").write_text("".join(written))
    trainer.train(config, tmp_path, resume="must")
    assert tiny.lines(tmp_path) == whole


def test_the_limit_is_of_wall_clock_time():
    assert not interrupt.Stop(0.0).asked() and not interrupt.Stop(1.0).asked()
    assert interrupt.Stop(1e-9).asked() == interrupt.TIME_LIMIT


STUCK = """
    import hashlib, os, signal, time
    from hybridlm.run.interrupt import Stop
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        while not stop.asked():
            time.sleep(0.01)
        print("asked", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # like a compilation: long, and not Python
"""


def test_a_second_signal_ends_at_once_even_outside_of_python():
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STUCK)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "asked\n"  # two warnings have not ended it
    run.terminate()
    assert run.wait(timeout=20) == 128 + signal.SIGTERM


def test_exit_code_and_resumption_of_a_real_run(config, whole, tmp_path):
    (tmp_path / "given.json").write_text(configs.to_json(config))
    command = [sys.executable, "train.py", f"--config={tmp_path}/given.json", f"--workdir={tmp_path}"]
    stopped = subprocess.run(
        [*command, "--config.train.max_minutes=0.0001"], cwd=ROOT, capture_output=True, text=True
    )
    assert stopped.returncode == 3, stopped.stderr
    assert "start again with --resume=auto" in stopped.stderr
    assert json.loads((tmp_path / "config.json").read_text())["train"]["max_minutes"] == 0.0001
