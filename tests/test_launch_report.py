"""The report from runs whose numbers are known: means, intervals, fronts, budgets, a whole page."""

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hybridlm import seal, untrusted
from hybridlm.errors import ConfigError
from launch import figures, report, results, state
from launch.results import Mean, Result

LAYERS = {"pure": [], "3:1": [3], "1:1": [1, 3]}


def write(workdir: Path, text: bool = False) -> None:
    """Two mixers at three ratios and two seeds, attention alone, one placement, one failed run."""
    runs = []
    for mixer, best in (("gla", 0.5), ("kda", 0.7)):
        for ratio, full in LAYERS.items():
            for seed in (0, 1):
                value = min(1.0, best + 0.2 * len(full)) + 0.01 * seed
                runs.append(
                    run(
                        workdir,
                        f"{mixer}_{ratio}_{seed}",
                        {"mixer": mixer, "ratio": ratio, "seed": str(seed)},
                        full,
                        value,
                        text,
                    )
                )
    runs.append(
        run(workdir, "full", {"mixer": "full", "ratio": "full", "seed": "0"}, [0, 1, 2, 3], 0.95, text)
    )
    runs.append(
        run(
            workdir, "placed", {"mixer": "kda", "ratio": "3:1", "placement": "0", "seed": "0"}, [0], 0.6, text
        )
    )
    runs.append(run(workdir, "bad", {"mixer": "gla", "ratio": "pure", "seed": "2"}, [], None, text))
    (workdir / "bad" / "error.txt").write_text("RunError: <the loss> is nan\n")
    (workdir / "sweep.json").write_text(json.dumps({"command": "python -m launch.sweep", "runs": runs}))


def seal_run(folder: Path, step: int = 20) -> None:
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "array").write_text("weights")
    seal.write(folder / "checkpoints" / str(step))


def change(workdir: Path, name: str, **fields: object) -> None:
    """``fields`` in every line of a run's metrics.jsonl."""
    path = workdir / name / "metrics.jsonl"
    lines = [json.loads(line) | fields for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(workdir: Path, name: str, point: dict, full: list[int], value: float | None, text: bool) -> dict:
    (workdir / name).mkdir(parents=True)
    lines = [] if value is None else [{"step": 5, "loss": 2.0, "tokens_per_second": 1.0}]
    for step in (10, 20) if value is not None else ():
        held_out = (
            {"val_loss": 3 - value, "val_bpb": 1.0} if text else {"val_loss": 1.0, "val_accuracy": value}
        )
        speed = {"tokens_per_second": 1000.0 - 100 * len(full)}
        lines.append({"step": step, "loss": 2.0, **speed, **held_out})
    (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if value is not None:
        seal_run(workdir / name)
        start = {"date": "2026-11-25T10:00:00+00:00", "commit": "abc1234", "device": "Test device"}
        start |= {"jax": "0", "processes": 1, "together": 1}
        (workdir / name / "machine.json").write_text(json.dumps({"starts": [start]}))
    sizes = {"learning_rate": 3e-4, "width": 64, "guess": {"recall": 0.1, "loss": 2.9}}
    sizes |= {"parameters": 1000, "state_bytes": 40 - 10 * len(full), "cache_bytes": 100 * len(full)}
    return {
        "name": name,
        "point": point,
        "steps": 20,
        "num_layers": 4,
        "full_layers": full,
        "tokens": 2000,
        "flops": 1.0,
        "seq_len": 8,
        **sizes,
    }


def test_means_and_student_intervals(tmp_path: Path):
    """Two seeds 0.01 apart: s = 0.01/sqrt(2), t(0.975, 1) = 12.706, so half is 12.706 * 0.005."""
    write(tmp_path)
    _, found = results.read(tmp_path)
    by = {(m.label, m.fraction): m for m in results.means(found, "recall") if not results.placed(m)}
    assert by["gla", 0.25].value == pytest.approx(0.705)
    assert by["gla", 0.25].high - 0.705 == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert 0.705 - by["gla", 0.25].low == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert math.isnan(by["full", 1.0].low)  # one seed has no interval
    assert by["kda", 0.5].high == 1.0  # 1.0 and 1.01: nothing is above 1
    assert {m.value for m in results.means(found, "loss")} == {1.0}


@pytest.mark.parametrize(("metric", "values", "ends"), [
    ("recall", (0.1, 0.3), (0.0, 1.0)), ("loss", (0.1, 0.3), (0.0, 0.2 + 12.7062 * 0.1))])  # fmt: skip
def test_intervals_stay_where_the_metric_can_be(metric: str, values, ends, tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    seeds = [found[0]._replace(point={**found[0].point, "seed": str(i)}, **{metric: v})
             for i, v in enumerate(values)]  # fmt: skip
    (mean,) = results.means(seeds, metric)
    assert (mean.low, mean.high) == pytest.approx(ends, rel=1e-4)
    figure = figures.over_fraction([mean, *results.means(found[-3:-2], metric)], metric)
    assert figure is not None
    (band,) = [one for one in figure.axes[0].collections if len(one.get_paths()[0].vertices) > 3][:1]
    assert band.get_paths()[0].vertices[:, 1].min() >= 0


def test_the_best_learning_rate_is_taken(tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    one = found[0]
    tried = [one._replace(point={**one.point, "seed": s, "learning_rate": r}, recall=v) for r, s, v in
             (("1e-3", "0", 0.2), ("1e-3", "1", 0.4), ("1e-2", "0", 0.9), ("1e-2", "1", 0.0))]  # fmt: skip
    (mean,) = results.means(tried, "recall")
    assert mean.value == pytest.approx(0.45) and mean.runs[0].point["learning_rate"] == "1e-2"


def test_series_end_in_attention_alone_and_leave_placements_out(tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    series = results.by_mixer(results.means(found, "recall"))
    assert {mixer: [m.fraction for m in line] for mixer, line in series.items()} == {
        "gla": [0, 0.25, 0.5, 1], "kda": [0, 0.25, 0.5, 1]}  # fmt: skip


def mean(name: str, size: int, value: float) -> Mean:
    rest = {
        "point": {},
        "state": "finished",
        "error": "",
        "full_layers": [],
        "num_layers": 1,
        "parameters": 1,
    }
    rest |= {"tokens": 1, "steps": 1, "recall": value, "loss": None, "tokens_per_second": None, "curves": {}}
    rest |= {"guess": {"recall": None, "loss": None}, "learning_rate": None, "width": None}
    rest |= {"commit": "", "date": "", "device": ""}
    return Mean((Result(name=name, bytes=size, **rest),), value, math.nan, math.nan)


def test_front_and_budgets():
    found = [
        mean("a", 10, 0.3),
        mean("b", 20, 0.2),
        mean("c", 30, 0.8),
        mean("d", 30, 0.7),
        mean("e", 5, 0.1),
    ]
    assert [(size, m.runs[0].name) for size, m in results.under_budgets(found, "recall")] == [
        (5, "e"),
        (10, "a"),
        (30, "c"),
    ]
    costs = {"a": 10, "b": 20, "c": 30, "d": 30, "e": 5}
    assert [m.runs[0].name for m in results.front(found, costs, 1, 1)] == [
        "c"
    ]  # more is better in both: c beats all


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


def test_a_folder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"holds no sweep.json"):
        report.write(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: workdir = ")


# What is shown of speed


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


# Folders that came from elsewhere


def edit(workdir: Path, **fields: object) -> None:
    """The first run of sweep.json with other fields."""
    record = json.loads((workdir / "sweep.json").read_text())
    record["runs"][0] |= fields
    (workdir / "sweep.json").write_text(json.dumps(record))


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '{"runs": 1}', '{"runs": [1]}', '{"runs": [{}]}', '{"runs":' + "[" * 9999,
    '{"runs": [], "command": 1}', '{"runs": [], "checkpoints": "no"}', "\udcff"])  # fmt: skip
def test_a_sweep_file_of_another_shape(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sweep.json").write_text(text, errors="surrogateescape")
    assert report.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "sweep.json" in message
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("field", "value"), [
    ("name", "../outside"), ("name", "/etc"), ("name", ""), ("name", "a\nb"), ("name", 7), ("name", "full"),
    ("name", "a\\b"), ("point", []), ("point", {"mixer": 1}), ("full_layers", [9]), ("full_layers", [1, 1]),
    ("full_layers", [-1]), ("full_layers", [True]), ("num_layers", 0), ("steps", 0), ("steps", 1e300),
    ("tokens", -1), ("tokens", 0), ("parameters", "many"), ("state_bytes", None), ("state_bytes", 1 << 70),
    ("guess", {"recall": "high"}), ("learning_rate", [])])  # fmt: skip
def test_a_run_of_a_sweep_file_that_cannot_be(field: str, value: object, tmp_path: Path):
    outside = tmp_path / "outside"
    write(tmp_path / "sweep")
    outside.mkdir()
    (outside / "error.txt").write_text("a secret\n")
    edit(tmp_path / "sweep", **{field: value})
    with pytest.raises(ConfigError):
        report.write(tmp_path / "sweep")


def test_links_out_of_a_run_are_not_followed(tmp_path: Path):
    workdir = tmp_path / "sweep"
    write(workdir)
    (tmp_path / "secret").write_text("open sesame\n")
    (workdir / "bad" / "error.txt").unlink()
    (workdir / "bad" / "error.txt").symlink_to(tmp_path / "secret")
    (workdir / "placed" / "metrics.jsonl").unlink()
    (workdir / "placed" / "metrics.jsonl").symlink_to(tmp_path / "secret")
    page = report.write(workdir).read_text()
    assert "sesame" not in page and "is a link to a place outside" in page


@pytest.mark.parametrize("line", [
    "[]", "1", "{}", '{"step": "20"}', '{"step": true}', '{"step": -1}', '{"step": 1e400}', "[" * 9999,
    '{"step": 20, "loss": 1.0, "tokens_per_second": 1.0, "val_accuracy": "high"}',
    '{"step": 20, "loss": null, "tokens_per_second": NaN, "val_loss": null, "val_accuracy": Infinity}',
    '{"step": 20, "eval/x": [], "val_bpb": {}}'])  # fmt: skip
def test_lines_of_metrics_that_are_none(line: str, tmp_path: Path):
    """No number comes of them, and no traceback; the other runs are reported."""
    write(tmp_path)
    with (tmp_path / "full" / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    _, found = results.read(tmp_path)
    (full,) = [run for run in found if run.name == "full"]
    assert full.recall in (None, 0.95) and full.tokens_per_second in (None, 600.0)
    assert len([run for run in found if run.recall is not None]) >= 13


def test_metrics_that_are_no_text(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "full" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    page = report.write(tmp_path).read_text()
    _, found = results.read(tmp_path)
    assert next(run for run in found if run.name == "full").recall is None and "2 of 15 runs" in page


def test_a_run_is_finished_when_its_last_checkpoint_is_sealed(tmp_path: Path):
    write(tmp_path)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert state.status(tmp_path / "full", 20).state == "finished"
    (checkpoints / "20" / "array").unlink()  # cut short
    assert state.status(tmp_path / "full", 20).state == "queued"
    assert state.status(tmp_path / "full", 20, sealed_runs=False).state == "finished"
    shutil.rmtree(checkpoints / "20")
    assert state.status(tmp_path / "full", 20).state == "queued"
    seal_run(tmp_path / "full", 10)  # of an earlier step
    assert state.status(tmp_path / "full", 20).state == "queued"
    (checkpoints / "20.orbax-checkpoint-tmp").mkdir()
    assert state.status(tmp_path / "full", 20).state == "queued"
    seal_run(tmp_path / "full", 20)
    (checkpoints / "20" / seal.NAME).write_text("")
    assert state.status(tmp_path / "full", 20).state == "queued"


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


# Figures


@pytest.mark.parametrize("values", [
    (1, 2), (900, 1100), (40, 41), (3e6, 3.1e6, 9e6), (1e3, 1e9), (5, 5), (1, 1e15)])  # fmt: skip
def test_a_log_axis_has_labels(values: tuple[float, ...]):
    axes = Figure().add_subplot()
    figures.log_axis(axes, values)
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels) and all(labels)
    assert axes.get_xlim()[0] < min(values) and max(values) < axes.get_xlim()[1]


def test_every_line_is_in_a_legend(tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    measured = results.means(found, "recall")
    legend = lambda figure: {label.get_text() for label in figure.legends[0].get_texts()}
    assert legend(figures.over_fraction(measured, "recall")) == {"gla", "kda", "guessing"}
    assert legend(figures.pareto(measured, "recall", "bytes")) == {"gla", "kda", "full", "front", "guessing"}
    assert legend(figures.curves(found, "recall")) == {
        f"{n} of 4" for n in (0, 1, 2, 4)} | {"guessing"}  # fmt: skip
    single = figures.pareto(measured[:2], "recall", "bytes")
    assert single is not None
    (front,) = [line for line in single.axes[0].lines if line.get_label() == "front"]
    assert front.get_marker() == "o"  # seen even where the front is one point


def test_lines_of_another_size_are_lines_of_their_own(tmp_path: Path):
    """An axis beside mixer and ratio: its values are not joined into one zigzag."""
    write(tmp_path)
    _, found = results.read(tmp_path)
    sized = [r._replace(point={**r.point, "size": size}) for size in ("small", "wide") for r in found]
    series = results.by_mixer(results.means(sized, "recall"))
    assert {label: [m.fraction for m in line] for label, line in series.items()} == {
        f"{mixer}, {size}": [0, 0.25, 0.5, 1] for mixer in ("gla", "kda") for size in ("small", "wide")
    }  # fmt: skip
