"""benchmarks.acceptance: its queue, with commands that only wait; the commands of its table can be typed."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import acceptance, step_rows
from benchmarks.acceptance_jobs import JOBS, Job
from hybridlm import config as configs
from tests import test_doc_commands

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.once


def job(name: str, timed: bool = False, jobs: bool = False, after: str = "", seconds: float = 1) -> Job:
    return Job(name, "-c pass {jobs}" if jobs else "-c pass", seconds, timed, "", after)


def stub(name: str, code: str, timed: bool = False, seconds: float = 1.0, after: str = "") -> Job:
    return Job(name, f"-c {shlex.quote(code)}", seconds, timed, "", after)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "done.jsonl").read_text().splitlines()]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Runs a table in place of the real one."""
    monkeypatch.setattr(acceptance, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(acceptance, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(acceptance, "commit", lambda: "c")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(jobs: list[Job], output: Path, *more: str) -> int:
        monkeypatch.setattr(acceptance, "JOBS", jobs)
        return acceptance.main([f"--output={output}", "--cards=0", "--jobs=2", *more])

    return run


def test_what_begins_on_which_card():
    alone, tests, quick = job("alone", timed=True), job("tests", jobs=True), job("quick")
    begins = lambda waiting, running, cards="01", jobs=4: acceptance.choose(waiting, running, cards, jobs)
    assert begins([alone, quick], []) == (alone, "0")
    assert begins([alone], [(tests, "0")]) == (alone, "1")
    assert begins([alone], [(tests, "0")], "0") is None  # nothing is timed on a card that others are on
    assert begins([quick], [(alone, "0")], "0") is None
    assert begins([quick], [(alone, "0")]) == (quick, "1")
    assert begins([quick], [(tests, "1")]) == (quick, "1")  # card 0 is left to what is timed
    assert begins([alone, quick], [(tests, "0")], "0") is None  # nor does it wait for ever
    assert begins([tests, quick], [(tests, "0"), (quick, "0"), (quick, "0")]) is None  # 2 + 1 + 1 + 2 of 4
    assert begins([tests], [], "0123", 1) == (tests, "0")  # one is always let in
    later = job("later", after="quick")
    assert begins([later, tests], [(quick, "0")]) == (tests, "0")
    assert begins([later], []) == (later, "0")


def test_order_and_lines(table, tmp_path: Path, capsys):
    code = "import os; print('card', os.environ['CUDA_VISIBLE_DEVICES'], os.getpriority(os.PRIO_PROCESS, 0))"
    jobs = [
        stub("later", "print('it')", after="first"),
        stub("first", f"import time; time.sleep(0.3); {code}"),
        stub("timed", code, timed=True),
        stub("bad", "raise SystemExit(3)"),
    ]
    assert table(jobs, tmp_path) == 1
    found = {row["name"]: row for row in rows(tmp_path)}
    assert list(found) == ["first", "later", "timed", "bad"]  # of the table, but for what waits for another
    assert found["bad"]["rc"] == 3 and found["first"]["rc"] == 0 and found["timed"]["beside"] == []
    assert {"load", "seconds", "device", "jax", "date", "commit", "command"} <= set(found["first"])
    said = (tmp_path / "first.log").read_text().splitlines()
    assert said[0].startswith("$ python -c ") and said[1].startswith("card 0 ") and len(said) == 2
    priority = lambda name: int((tmp_path / f"{name}.log").read_text().split()[-1])
    assert (
        priority("first") > priority("timed") or priority("timed") >= 10
    )  # if the tests are nice themselves
    assert "failed: bad; left: none" in capsys.readouterr().out


def test_nothing_runs_beside_what_is_timed(table, tmp_path: Path):
    code = "import time; print(time.time()); time.sleep(0.2); print(time.time())"
    assert table([stub(f"t{i}", code, timed=i % 2 == 0) for i in range(4)], tmp_path) == 0
    spans = [list(map(float, (tmp_path / f"t{i}.log").read_text().split()[-2:])) for i in range(4)]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_the_end_of_the_time_and_the_same_again(table, tmp_path: Path, capsys):
    slow = "import os, time; print('up', flush=True); time.sleep(0 if os.path.exists('{}') else 60)"
    slow = slow.format(tmp_path / "quick.now")
    jobs = [stub("done", "print('once')"), stub("slow", slow), stub("long", "print('never')", seconds=50)]
    began = time.monotonic()
    assert table(jobs, tmp_path, "--seconds=2") == 1
    assert time.monotonic() - began < 10
    shown = capsys.readouterr().out
    assert "long: not begun, it takes 50 s" in shown and "slow: cut after" in shown
    assert [row["name"] for row in rows(tmp_path)] == ["done"] and not (tmp_path / "long.log").exists()
    assert "up" in (tmp_path / "slow.log").read_text()  # as it came

    (tmp_path / "quick.now").touch()
    assert table(jobs, tmp_path, "--seconds=100") == 0
    assert sorted(row["name"] for row in rows(tmp_path)) == ["done", "long", "slow"]
    assert (tmp_path / "done.log").read_text().splitlines().count("once") == 1  # nothing twice
    assert table(jobs, tmp_path) == 0 and len(rows(tmp_path)) == 3


def test_failures_run_again_when_asked(table, tmp_path: Path, capsys):
    bad = [stub("bad", f"import sys, os; sys.exit(not os.path.exists({str(tmp_path / 'now')!r}))")]
    assert table(bad, tmp_path) == 1 and table(bad, tmp_path) == 1 and len(rows(tmp_path)) == 1
    (tmp_path / "now").touch()
    assert table(bad, tmp_path, "--retry") == 0 and len(rows(tmp_path)) == 2
    assert table(bad, tmp_path, "--list") == 0 and "exit code 0" in capsys.readouterr().out


@pytest.mark.parametrize("first", [stub("first", "raise SystemExit(1)"), stub("first", "", seconds=5000)])
def test_nothing_begins_without_what_it_needs(first, table, tmp_path: Path, capsys):
    other, then = stub("other", ""), stub("then", "", after="first")
    for _ in range(2):  # the second time a failure stands in the lines
        assert table([first, then, other], tmp_path) == 1
        assert "then: not begun, first failed, or was not begun" in capsys.readouterr().out
    assert {row["name"] for row in rows(tmp_path)} - {"first"} == {"other"}


def test_a_line_that_was_cut_is_dropped(table, tmp_path: Path):
    assert table([stub("one", "")], tmp_path) == 0
    with (tmp_path / "done.jsonl").open("a") as file:
        file.write('{"name": "two", "r')
    assert table([stub("one", ""), stub("two", "")], tmp_path) == 0
    assert [row["name"] for row in rows(tmp_path)] == ["one", "two"]


def test_one_that_takes_too_long_has_failed(table, tmp_path: Path):
    assert table([stub("hung", "import time; time.sleep(60)", seconds=0.1)], tmp_path) == 1
    assert rows(tmp_path)[0]["rc"] == -signal.SIGTERM


def test_lines_of_another_commit_are_refused(table, tmp_path: Path, capsys):
    (tmp_path / "done.jsonl").write_text(json.dumps({"name": "x", "rc": 0, "commit": "other"}) + "\n")
    with pytest.raises(SystemExit):
        table([], tmp_path)
    assert "commit other, this is c: give another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table([stub("x", "")], tmp_path, "--only=y")
    assert "unknown: y; known, or how they begin: x" in capsys.readouterr().err


def test_a_signal_ends_children_and_theirs(tmp_path: Path):
    """A job's own children, and one that does not heed the first signal."""
    child = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
    )
    code = f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += "print(os.getpid(), p.pid, flush=True); p.wait()"
    script = f"""
from benchmarks import acceptance
acceptance.GRACE_SECONDS = 1.0
acceptance.JOBS = [acceptance.Job("job", {("-c " + shlex.quote(code))!r}, 30, False, "")]
raise SystemExit(acceptance.main(["--output={tmp_path}", "--cards=0"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    log, until = tmp_path / "job.log", time.monotonic() + 60
    while not (log.exists() and "\nchild" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    found = re.search(r"^(\d+) (\d+)$", log.read_text(), re.MULTILINE)
    assert found
    process.terminate()
    assert process.wait(30) == 1 and not (tmp_path / "done.jsonl").exists()
    for pid in map(int, found.groups()):
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


# The table.


def command(one: Job) -> str:
    return f"python {one.command}".format(jobs=2, output="results")


@pytest.mark.parametrize("one", JOBS, ids=lambda one: one.name)
def test_command_can_be_typed(one: Job, monkeypatch: pytest.MonkeyPatch):
    test_doc_commands.test_command(command(one), True, monkeypatch)
    assert (ROOT / one.shows.split(": ")[1]).is_file()
    words = shlex.split(command(one))
    named = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if named:
        fields = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        configs.resolve(configs.load(named[0], dict(field.split("=", 1) for field in fields)))
    for word in words:
        if word.startswith(("--rows=", "--first=")):
            assert set(word.partition("=")[2].split(",")) <= set(step_rows.ROWS)


def test_names_and_what_comes_before():
    names = [one.name for one in JOBS]
    assert len(set(names)) == len(names)
    assert all(one.after in names[:i] for i, one in enumerate(JOBS) if one.after)


def test_every_test_of_a_gpu_is_there():
    """But those of parity, which compare with another package."""
    marked = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/test_*.py")
        if "mark.gpu" in (text := path.read_text()) and "mark.parity" not in text
    }
    listed = [word for one in JOBS for word in one.command.split() if word.startswith("tests/")]
    assert marked - {"tests/test_acceptance.py"} <= set(listed) and len(listed) == len(set(listed))


def test_list(capsys):
    assert acceptance.main(["--list", "--only=tests,step_portable", f"--output={os.devnull}/none"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [
        *(one.name for one in JOBS if one.name.startswith("tests_")),
        "step_portable",
    ]
    assert all(" python -m " in line and " s " in line for line in shown)
