import io
import json
import logging
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import FrozenConfigDict
from rich.console import Console

from hybridlm.errors import RunError
from hybridlm.run import logbook


def config(mode="disabled", steps=100):
    log = {"wandb_mode": mode, "project": "test", "name": ""}
    return FrozenConfigDict({"log": log, "train": {"steps": steps}})


def line(loss=1.0, **more):
    return {"loss": loss, "tokens_per_second": 10.0, "step_seconds": 0.5, **more}


def write(path, written, start=0, **options):
    with logbook.Logbook(path, config(**options), start=start) as book:
        for step in written:
            book.write(step, line(loss=float(step)))


def test_lines_are_on_disk_as_they_are_written(tmp_path):
    with logbook.Logbook(tmp_path, config(), start=0) as book:
        book.write(1, line(val_loss=2.0))
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1} | line(val_loss=2.0)


def test_resumption_cuts_back_to_the_checkpoint(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss": 1.')  # a kill in mid-line
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, [30, 40, 50], start=20)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[:4] == before[:4]  # bit for bit, since these are the same numbers
    assert [json.loads(text)["step"] for text in after] == [10, 20, 30, 40, 50]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [5], start=0)
    assert [record["step"] for record in logbook.read(tmp_path / "metrics.jsonl")] == [5]


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError), logbook.Logbook(tmp_path, config(), start=0) as book:
        book.write(1, line(loss=float("nan")))


def test_full_disk_is_a_run_error(tmp_path):
    book = logbook.Logbook(tmp_path, config(), start=0)
    book.path = Path("/dev/full")
    with pytest.raises(RunError, match="cannot be written at step 3: No space left"), book:
        book.write(3, line())


def test_plain_output_is_few_lines(tmp_path, capsys):
    write(tmp_path, range(1, 1001), steps=1000)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= logbook.PLAIN_LINES + 1
    assert lines[0].startswith("step 1/1000  loss 1.0000  tokens/s 10")


def test_progress_says_what_is_left_and_the_share_of_the_peak(tmp_path, capsys):
    with logbook.Logbook(tmp_path, config(steps=20_000), start=0) as book:
        book.write(10_000, line(mfu=0.4321))
    assert capsys.readouterr().out.splitlines()[0].endswith("MFU 43.2%  83 min left")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (5940, "99 min"), (11_100, "3 h 05 min")],
)
def test_span(seconds, said):
    assert logbook.span(seconds) == said


class FakeWandb:
    def __init__(self, fail=""):
        self.calls, self.fail = [], fail
        self.Settings = lambda **settings: settings

    def _call(self, what, **arguments):
        if what == self.fail:
            raise RuntimeError("server on fire")
        self.calls.append((what, arguments))
        return self

    def init(self, **arguments):
        return self._call("init", **arguments)

    def log(self, metrics, step):
        self._call("log", metrics=metrics, step=step)

    def finish(self, exit_code):
        self._call("finish", exit_code=exit_code)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_gets_the_same_metrics_and_keeps_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, [1, 2], mode="offline")
    write(tmp_path, [3], start=2, mode="offline")
    inits = [arguments for name, arguments in fake.calls if name == "init"]
    assert (
        inits[0]["id"] == inits[1]["id"] and inits[0]["mode"] == "offline" and inits[0]["resume"] == "allow"
    )
    logged = [{"step": a["step"], **a["metrics"]} for name, a in fake.calls if name == "log"]
    assert logged == logbook.read(tmp_path / "metrics.jsonl")


def test_wandb_goes_offline_without_a_key_and_says_so_once(tmp_path, monkeypatch, caplog, no_key):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING, "hybridlm"):
        write(tmp_path, [1, 2, 3], mode="online")
    assert fake.calls[0][1]["mode"] == "offline"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "no W&B key" in caplog.text


def test_wandb_key_is_found(monkeypatch, no_key, tmp_path):
    assert not logbook.has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert logbook.has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert logbook.has_key()


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_wandb_never_fails_the_run(tmp_path, monkeypatch, caplog, fail):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail))
    write(tmp_path, [1, 2, 3], mode="offline")
    assert len(logbook.read(tmp_path / "metrics.jsonl")) == 3
    assert caplog.text.count("server on fire") == 1


def test_disabled_wandb_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    write(tmp_path, [1])


def test_a_terminal_gets_a_bar_with_numbers_and_an_estimate(tmp_path, monkeypatch):
    terminal = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(logbook.rich, "get_console", lambda: terminal)
    with logbook.Logbook(tmp_path, config(), start=40) as book:
        book.write(45, line(bits_per_byte=3.0))
        time.sleep(0.01)
        book.write(50, line(bits_per_byte=2.0, sample="def \x1b[31mf"))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())
    assert re.search(r"50/100 loss 1\.0000  bits/byte 2\.000  tokens/s 10 \d:\d\d:\d\d", shown)
    assert "def \N{REPLACEMENT CHARACTER}[31mf" in shown  # a sample cannot steer the terminal
