"""The report from runs whose numbers are known: means, intervals, fronts, budgets, a whole page."""

import csv
import json
import re
from pathlib import Path

import pytest

from hybridlm.errors import ConfigError
from launch import report, results
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
    sizes = {"parameters": 1000, "state_bytes": 40 - 10 * len(full), "cache_bytes": 100 * len(full)}
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
    by = {(m.runs[0].mixer, m.fraction): m for m in results.means(found, "recall") if not results.placed(m)}
    assert by["gla", 0.25].value == pytest.approx(0.705)
    assert by["gla", 0.25].half == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert by["full", 1.0].half != by["full", 1.0].half  # nan: one seed has no interval
    assert results.means(found, "loss") == []


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
    return Mean((Result(name=name, bytes=size, **rest),), value, float("nan"))


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
    assert ("2.295 ± 0.064" if text else "0.705 ± 0.064") in page  # gla with one full layer
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and rows[2]["full_layers"] == "3"
    assert rows[0][metric] == ("2.5" if text else "0.5") and rows[-1]["state"] == "failed"


def test_a_folder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"holds no sweep.json"):
        report.write(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: workdir = ")
