import io
import json
import logging
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from rich.console import Console

from hybridlm.errors import RunError
from hybridlm.run import logbook, tracking


def config(mode="disabled", steps=100, tensorboard=False):
    log = {"wandb_mode": mode, "project": "test", "name": "", "tensorboard": tensorboard}
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


def test_what_json_does_not_have_is_null_or_text():
    given = {"loss": np.float32(2), "val_loss": math.nan, "x": math.inf, "sample": "a\udcff", "odd": [1, {}]}
    values, lost = logbook.recordable(given)
    assert values == {"loss": 2.0, "val_loss": None, "x": None, "sample": "a\\udcff", "odd": "[1, {}]"}
    assert lost == ["val_loss", "x"]


def test_a_null_is_not_there_when_read(tmp_path):
    with logbook.Logbook(tmp_path, config(), start=0) as book:
        book.write(1, line(val_loss=None))
    assert '"val_loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert logbook.read(tmp_path / "metrics.jsonl") == [{"step": 1} | line()]


def test_lines_wait_for_a_full_disk(tmp_path, monkeypatch):
    """Half a line is taken back; all are written, in order, when there is room again."""
    with logbook.Logbook(tmp_path, config(), start=0) as book:
        book.write(1, line())
        real = book.file
        book.file = SimpleNamespace(
            write=lambda text: real.write(text[:9]), fileno=real.fileno, close=real.close
        )
        assert "No space left" in book.write(2, line())
        assert book.write(3, line()) == ""  # said once
        assert [one["step"] for one in logbook.read(tmp_path / "metrics.jsonl")] == [1]
        book.file = real
        assert book.write(4, line()) == ""
    assert [one["step"] for one in logbook.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_lines_that_never_fit_are_an_error_at_the_end(tmp_path):
    book = logbook.Logbook(tmp_path, config(), start=0)
    book.path = Path("/dev/full")
    with pytest.raises(RunError, match="2 lines could not be written: No space left"), book:
        book.write(3, line())
        book.write(4, line())


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 30, b"\xff\xfe", b"[]", b'{"loss": 1}', b'{"step": "x"}', b"[" * 9999, b'{"step": 1, "step": 2}',
     b'{"step": -1}', b'{"step": 99999999999999999999}', b"null", b'{"step": 20, "sample": "\\ud800"}'],
)  # fmt: skip
def test_damaged_lines_are_set_aside_and_named(tmp_path, damage, caplog):
    """In the middle and at the end; the others stay as they are."""
    write(tmp_path, [10, 20, 30, 40])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + b"".join(lines[2:]) + b"\xff\n" + b'{"step": 50')
    assert [one["step"] for one in logbook.read(path)] == [10, 30, 40]
    write(tmp_path, [40], start=30)
    assert path.read_bytes() == lines[0] + lines[2] + lines[3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n\xff\n"
    assert "damaged lines set aside in metrics.jsonl.damaged: 2, 5" in caplog.text


def test_a_bar_that_cannot_be_shown_ends_nothing(tmp_path, monkeypatch, caplog):
    """rich leaves by SystemExit when the reader of a pipe is gone."""
    for error in (SystemExit(1), OSError(28, "full"), UnicodeEncodeError("ascii", "x", 0, 1, "no")):
        monkeypatch.setattr(logbook.Progress, "update", Mock(side_effect=error))
        write(tmp_path, [1, 2])
    assert caplog.text.count("showing failed") == 6
    assert len(logbook.read(tmp_path / "metrics.jsonl")) == 2


def test_a_damaged_id_of_wandb_is_replaced(tmp_path):
    for damage in (b"", b"\0" * 8, b"../x"):
        (tmp_path / "wandb_id").write_bytes(damage)
        first = tracking.run_id(tmp_path)
        assert first.isalnum() and tracking.run_id(tmp_path) == first


def test_plain_output_is_few_lines(tmp_path, capsys):
    write(tmp_path, range(1, 1001), steps=1000)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= logbook.PLAIN_LINES + 1
    assert lines[0].startswith("step 1/1000  loss 1.0000  tokens/s 10")


def test_progress_says_what_is_left_and_the_share_of_the_peak(tmp_path, capsys):
    with logbook.Logbook(tmp_path, config(steps=20_000), start=0) as book:
        book.write(10_000, line(mfu=0.4321, hfu=0.5))
    assert capsys.readouterr().out.splitlines()[0].endswith("MFU 43.2%  HFU 50.0%  83 min left")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (5940, "99 min"), (11_100, "3 h 05 min")],
)
def test_span(seconds, said):
    assert logbook.span(seconds) == said


class FakeWandb:
    def __init__(self, fail="", error=RuntimeError):
        self.calls, self.fail, self.error = [], fail, error
        self.Settings = lambda **settings: settings

    def _call(self, what, **arguments):
        if what == self.fail:
            raise self.error("server on fire")
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
    assert not tracking.has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking.has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.has_key()


def test_credentials_that_cannot_be_read_are_none(tmp_path, monkeypatch, no_key):
    (tmp_path / "netrc").write_bytes(b"machine \xff\xfe login")
    assert not tracking.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://[")
    assert not tracking.has_key()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_wandb_never_fails_the_run(tmp_path, monkeypatch, caplog, fail, error):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail, error))
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
    assert re.search(r"50/100 \d:\d\d:\d\d loss 1\.0000  bits/byte 2\.000  tokens/s 10", shown)
    assert "def \\x1b[31mf" in shown  # a sample cannot steer the terminal


def test_eighty_columns_show_speed_and_the_time_that_is_left(monkeypatch):
    shown = Console(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr("rich.get_console", lambda: shown)
    bar = logbook.Bar(0, 1000, quiet=False)
    bar.show(
        100, line(loss=10.6136, bits_per_byte=15.313, mfu=0.049, hfu=0.06) | {"tokens_per_second": 21644.0}
    )
    with shown.capture() as capture:
        shown.print(bar.bar.get_renderable())
    [text] = re.sub("\x1b[^m]*m", "", capture.get()).splitlines()
    assert re.search(r"100/1000 \S*:\S* loss 10.6136  bits/byte 15.313  tokens/s 21,644", text), text
