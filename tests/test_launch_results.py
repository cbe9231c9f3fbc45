"""Results of runs whose numbers are known: means, intervals, fronts; and folders that came from elsewhere."""

import json
import math
from pathlib import Path

import pytest

from hybridlm.errors import ConfigError
from launch import figures, report, results
from launch.results import Mean, Result
from tests.sweep_files import write


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
    tried[-1] = tried[-1]._replace(recall=None)  # diverged, while the seed that is left has the best number
    (mean,) = results.means(tried, "recall")
    assert mean.value == pytest.approx(0.3) and mean.runs[0].point["learning_rate"] == "1e-3"


def test_tokens_of_a_curve_are_those_of_the_stages(tmp_path: Path):
    """Steps 5 and 10 of a stage with 3 tokens a step, 20 of one with 30 behind it."""
    write(tmp_path, text=True)
    record = json.loads((tmp_path / "sweep.json").read_text())
    record["runs"][0] |= {"parts": [[12, 3], [20, 30]], "tokens": 12 * 3 + 8 * 30}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    _, found = results.read(tmp_path)
    assert [tokens for tokens, _ in found[0].curves["loss"]] == [30, 276]
    record["runs"][0]["parts"] = [[12, 3, 1]]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="the parts of"):
        results.read(tmp_path)


def test_series_end_in_attention_alone_and_leave_placements_out(tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    series = results.by_mixer(results.means(found, "recall"))
    assert {mixer: [m.fraction for m in line] for mixer, line in series.items()} == {
        "gla": [0, 0.25, 0.5, 1], "kda": [0, 0.25, 0.5, 1]}  # fmt: skip


def test_lines_of_another_size_are_lines_of_their_own(tmp_path: Path):
    """An axis beside mixer and ratio: its values are not joined into one zigzag."""
    write(tmp_path)
    _, found = results.read(tmp_path)
    sized = [r._replace(point={**r.point, "size": size}) for size in ("small", "wide") for r in found]
    series = results.by_mixer(results.means(sized, "recall"))
    assert {label: [m.fraction for m in line] for label, line in series.items()} == {
        f"{mixer}, {size}": [0, 0.25, 0.5, 1] for mixer in ("gla", "kda") for size in ("small", "wide")
    }  # fmt: skip


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


def edit(workdir: Path, **fields: object) -> None:
    """The first run of sweep.json with other fields."""
    record = json.loads((workdir / "sweep.json").read_text())
    record["runs"][0] |= fields
    (workdir / "sweep.json").write_text(json.dumps(record))


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
