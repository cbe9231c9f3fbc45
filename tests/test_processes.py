"""Two real processes as one run (CPU, gloo): killed, named, resumed by another number of processes."""

import random
import re
import signal
import socket
import threading
import time

import pytest

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.errors import ConfigError
from hybridlm.run import processes
from hybridlm.run.lock import Lock
from hybridlm.run.processes import join
from tests import process_runs, tiny

FIELDS = {
    "model__pattern": "retnet",
    "optimizer__learning_rate": 1e-3,  # so that rounding is not amplified
    "train__steps": 30,
    "checkpoint__every_steps": 5,
    "eval__every_steps": 7,
    "log__every_steps": 2,
}


@pytest.mark.slow
def test_stopped_then_killed_then_resumed_alone(tmp_path):
    text = tiny.write_text(tmp_path)
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    arguments = process_runs.arguments(tmp_path, workdir, **FIELDS)
    running = process_runs.start(2, arguments, logs)
    process_runs.await_lines(workdir, 2, running)
    running[1].send_signal(signal.SIGTERM)  # to one: both leave, after the same step
    assert process_runs.finish(running, seconds=60) == [3, 3]
    stopped = [re.findall(r"complete checkpoint at step \d+", (logs / str(i)).read_text()) for i in (0, 1)]
    assert stopped[0] == stopped[1] != []

    running = process_runs.start(2, arguments, logs)
    process_runs.await_lines(workdir, len(tiny.lines(workdir)) + 2, running)
    victim = random.Random().randint(0, 1)
    running[victim].send_signal(signal.SIGKILL)
    codes = process_runs.finish(running, seconds=60)
    other = (logs / str(1 - victim)).read_text()
    assert codes[victim] == -signal.SIGKILL, other
    if victim == 0 and codes[1] == -signal.SIGABRT:  # JAX, whose service process 0 carries, was quicker
        assert "another task died" in other
    else:
        assert codes[1 - victim] == 1, other
        assert re.search(rf"error: process {victim}.* ended without a word: killed or crashed", other)

    config = configs.resolve(tiny.config(text, **FIELDS))
    trainer.train(config, workdir, resume="must")
    trainer.train(config, tmp_path / "whole")
    lines, whole = tiny.lines(workdir), tiny.lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    for line, expected in zip(lines, whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_a_failure_of_one_is_told_by_all(tmp_path):
    """A workdir in use is seen by process 0 alone."""
    tiny.write_text(tmp_path)
    workdir = tmp_path / "run"
    workdir.mkdir()
    with Lock(workdir):
        running = process_runs.start(
            2, process_runs.arguments(tmp_path, workdir, **FIELDS), tmp_path / "logs"
        )
        assert process_runs.finish(running, seconds=100) == [2, 2]
    for index in (0, 1):
        assert "is in use by process" in (tmp_path / "logs" / str(index)).read_text()
    assert re.search(r"process 0 \(pid \d+ on .*\): error: --workdir", (tmp_path / "logs" / "1").read_text())


def test_processes_that_differ_do_not_train(tmp_path):
    """Each would have trained on half of the devices' gradients of another model."""
    tiny.write_text(tmp_path)
    given = process_runs.arguments(tmp_path, tmp_path / "run", **FIELDS)
    own = [[], ["--config.optimizer.learning_rate=0.5"]]
    running = process_runs.start(2, given, tmp_path / "logs", own=own)
    assert process_runs.finish(running, seconds=200) == [2, 2]
    for index in (0, 1):
        log = (tmp_path / "logs" / str(index)).read_text()
        assert "optimizer.learning_rate" in log and "is 0.5 in process 1, and 0.001 in process 0" in log
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_process_without_a_sign_of_life_is_named_in_time(monkeypatch):
    """Stopped, or its host gone: its socket stays open. One that is only slow, or has said bye, is none."""
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.4)
    peers, said = object.__new__(processes.Peers), []
    pairs = {index: socket.socketpair() for index in (1, 2)}
    peers.index, peers.leaving, peers.sending = 0, False, threading.Lock()
    peers.sockets = {index: pair[0] for index, pair in pairs.items()}
    peers.names = {index: f"process {index} (pid 7 on h)" for index in (1, 2, 3)}
    peers.heard = {index: time.monotonic() for index in pairs}

    def end(message, code):
        said.append((message, code))
        peers.leaving = True

    peers._end = end
    thread = threading.Thread(target=peers._beat)
    thread.start()
    began = time.monotonic()
    while thread.is_alive() and time.monotonic() < began + 30:
        peers.heard[1] = time.monotonic()  # 1 beats
        time.sleep(0.005)
    assert said[0][1] == 1 and said[0][0].startswith(
        "process 2 (pid 7 on h) has given no sign of life for 0.4 s"
    )
    assert b'{"beat": true}' in pairs[1][1].recv(100)
    for pair in pairs.values():
        [one.close() for one in pair]


@pytest.mark.parametrize("spec", ["", "here", "localhost,2,0", "localhost:1,two,0"])
def test_an_address_that_is_none_is_refused(spec):
    with pytest.raises(ConfigError, match=r"--distributed = .*must be auto or HOST:PORT,COUNT,INDEX"):
        join(spec)
