"""The report as a page: it stands alone, shows what can be compared, and takes any name for a text."""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from hybridlm import untrusted
from hybridlm.errors import ConfigError
from launch import figures, page, report, results
from tests.sweep_files import change, write

pytestmark = pytest.mark.once  # a page and its text, made of files


@pytest.mark.parametrize("text", [False, True])
def test_the_page_stands_alone(text: bool, tmp_path: Path):
    write(tmp_path, text)
    page = report.write(tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page and "@import" not in page
    assert 'name="viewport"' in page
    metric = "loss" if text else "recall"
    for name in ("by_fraction", "by_placement", "by_bytes", "by_speed", "curves"):
        assert (tmp_path / f"{metric}_{name}.png").stat().st_size > 5000
        assert f'alt="{metric} {name.replace("_", " ")}"' in page
    assert "RunError: &lt;the loss&gt; is nan" in page and "1 of 15 runs did not finish" in page
    assert ("2.295\n2.231 to 2.359" if text else "0.705\n0.641 to 0.769") in page  # gla, one full layer
    for shown in ("0.0003", "abc1234", "2026-11-25", "Guessing gets", "Trained on Test device"):
        assert shown in page
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and rows[2]["full_layers"] == "3"
    assert rows[0][metric] == ("2.5" if text else "0.5") and rows[-1]["state"] == "failed"
    noted = ("learning_rate", "width", "tokens", "commit", "date", "device", "loss")
    assert [rows[0][name] for name in noted[:-1]] == [
        "0.0003", "64", "2000", "abc1234", "2026-11-25", "Test device"]  # fmt: skip
    assert rows[0]["loss"]  # a task has a loss too


def test_a_finished_run_without_the_number_is_said(tmp_path: Path):
    """A validation that failed, or a loss that is not finite, is null in the last line."""
    write(tmp_path, text=True)
    change(tmp_path, "gla_pure_1", val_loss=None)
    shown = report.write(tmp_path).read_text()
    assert re.search(r"loss: not a number at the end of [^.]*gla_pure_1", shown)


def test_columns_stand_to_one_side_and_hyphens_break_no_word():
    """A median that was not reached ("> 3 M") stands under the others, "12:1" under "pure"."""
    html = report._table(["ratio", "after tokens"], [["pure", "> 3 M"], ["12:1", "2 M"]])
    assert re.findall(r"<t([hd])( class=.number.)?>", html) == [
        ("h", ""), ("h", ' class="number"'), *[("d", ""), ("d", ' class="number"')] * 2]  # fmt: skip
    words = re.findall(r'<span class="word">(.*?)</span>', page.prose("on 2026-11-25. --config=<a b> 3 c"))
    assert words == ["2026-11-25.", "--config=&lt;a"]


def test_a_folder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"holds no sweep.json"):
        report.write(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: workdir = ")


def test_a_speed_that_was_not_its_own_is_nowhere(tmp_path: Path):
    """Packed runs, runs that shared their device at one start, runs of two kinds of device."""
    write(tmp_path)
    report.write(tmp_path)
    assert (
        "tokens/s" in (tmp_path / "report.html").read_text() and (tmp_path / "recall_by_speed.png").exists()
    )
    change(tmp_path, "gla_pure_0", packed=2)
    notes = json.loads((tmp_path / "gla_pure_1" / "machine.json").read_text())
    notes["starts"].insert(0, notes["starts"][0] | {"processes": 2})
    (tmp_path / "gla_pure_1" / "machine.json").write_text(json.dumps(notes))
    (tmp_path / "gla_3:1_0" / "machine.json").unlink()
    _, found = results.read(tmp_path)
    speeds = {run.name: run.tokens_per_second for run in found}
    assert [speeds[name] for name in ("gla_pure_0", "gla_pure_1", "gla_3:1_0", "full", "kda_pure_0")] == [
        None, None, None, 600.0, 1000.0]  # fmt: skip
    for run in found:
        if run.tokens_per_second and run.name != "full":
            notes["starts"] = [notes["starts"][1] | {"device": "Another device"}]
            (tmp_path / run.name / "machine.json").write_text(json.dumps(notes))
            break
    page = report.write(tmp_path).read_text()
    assert "tokens/s" not in page and "No speed is shown" in page
    assert not (tmp_path / "recall_by_speed.png").exists()  # the one of the earlier report


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '{"runs": 1}', '{"runs": [1]}', '{"runs": [{}]}', '{"runs":' + "[" * 9999,
    '{"runs": [], "command": 1}', '{"runs": [], "checkpoints": "no"}', "\udcff"])  # fmt: skip
def test_a_sweep_file_of_another_shape(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sweep.json").write_text(text, errors="surrogateescape")
    assert report.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "sweep.json" in message
    assert not (tmp_path / "report.html").exists()


def test_names_are_text_wherever_they_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Mathematics that is none, markup, a terminal's escapes, a legend's hidden name, a formula, the home."""
    workdir = tmp_path / "a[/b] $_{x$ \x1b[31m"
    write(workdir)
    record = json.loads((workdir / "sweep.json").read_text())
    names = ["$_{x$", "_hidden", "<b>[/b]\x1b[2J", "=1+1", os.path.expanduser("~/data"), "x" * 500]
    for i, run_record in enumerate(record["runs"]):
        run_record["point"] = run_record["point"] | {"mixer": names[i % len(names)]}
    record["command"] = f"python -m launch.sweep --config={os.path.expanduser('~')}/s.py"
    (workdir / "sweep.json").write_text(json.dumps(record))
    (workdir / "bad" / "error.txt").write_text(
        f"{os.path.expanduser('~')}/x: \x1b]0;title\x07[/red] failed\n"
    )
    assert report.main([str(workdir)]) == 0
    said, page = capsys.readouterr().out, (workdir / "report.html").read_text()
    table = (workdir / "results.csv").read_text()
    assert "\x1b" not in said + page + table and "<b>" not in page
    texts = re.sub(r"base64,[^\"]*", "", page) + table
    assert os.path.expanduser("~") + "/" not in texts and "~/data" in texts
    assert "'=1+1" in table
    _, found = results.read(workdir)
    drawn = figures.over_fraction(results.means(found, "recall"), "recall")
    assert drawn is not None
    legend = [label.get_text() for label in drawn.legends[0].get_texts()]
    assert any("hidden" in text for text in legend) and any("_{x" in text for text in legend)
    assert all(len(text) < 60 for text in legend)


def test_a_disk_that_refuses(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """One line, and the earlier report as it was."""
    write(tmp_path)
    before = report.write(tmp_path).read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(untrusted, "write_bytes", full)
    assert report.main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the report cannot be written (No space left on device)" in message
    assert (tmp_path / "report.html").read_bytes() == before
