import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hybridlm.errors import ConfigError, RunError
from hybridlm.run import lock
from hybridlm.run.lock import Lock

BEAT = 0.05
HOLD = """
    import sys, time
    from pathlib import Path
    from hybridlm.run.lock import Lock
    with Lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", textwrap.dedent(HOLD), tmp_path]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_is_gone(holder, tmp_path, caplog):
    with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on "), Lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lock(tmp_path):
        pass
    assert f"left behind by process {holder.pid}" in caplog.text
    with Lock(tmp_path):  # released well: nothing to say
        pass
    assert caplog.text.count("left behind") == 1


def test_without_flock_the_process_decides(holder, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(ConfigError, match="is in use by process"), Lock(tmp_path, BEAT):
        pass
    holder.kill()
    holder.wait()
    with Lock(tmp_path, BEAT):
        pass


def elsewhere(path, beats):
    """Writes what a run on another host does, ``beats`` times; flock there is not seen here."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for beat in range(beats):
        owner = {"host": "elsewhere", "pid": 7, "token": "x", "beat": beat}
        os.pwrite(file, json.dumps(owner).encode().ljust(161), 0)
        time.sleep(BEAT / 2)
    os.close(file)


def test_a_run_on_another_host_is_told_from_a_dead_one_by_its_beat(tmp_path, caplog):
    elsewhere(tmp_path / "lock", 1)
    beating = threading.Thread(target=elsewhere, args=(tmp_path / "lock", 40))
    beating.start()
    with pytest.raises(ConfigError, match="is in use by process 7 on elsewhere"), Lock(tmp_path, BEAT):
        pass
    beating.join()
    with Lock(tmp_path, BEAT):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "left behind by process 7 on elsewhere" in caplog.text


def test_a_run_that_lost_its_lock_notices(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Lock(tmp_path, BEAT) as held:
        time.sleep(3 * BEAT)
        held.check()
        elsewhere(tmp_path / "lock", 1)
        time.sleep(4 * BEAT)
        with pytest.raises(RunError, match="taken over by process 7 on elsewhere"):
            held.check()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"  # not ours to release
