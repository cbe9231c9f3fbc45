"""When a task was learnt: curves written by hand, and a survival curve worked out by hand."""

import json

import pytest

from eval import convergence, curves
from eval.convergence import Convergence, first, of, times
from hybridlm import config as configs
from hybridlm.report import quantity
from launch import report
from tests import sweep_files, tiny


def test_two_evaluations_in_a_row():
    curve = [(10.0, 0.1), (20.0, 0.95), (30.0, 0.5), (40.0, 0.7), (50.0, 0.92), (60.0, 0.96)]
    found = of(curve, 0.1)
    assert found == Convergence(40.0, 50.0, 60.0, 0.1)  # 0.55 is half way; 20 was not confirmed
    assert of(curve[:3], 0.1) == Convergence(None, None, 30.0, 0.1)
    assert first(curve, 0.96) == 60.0  # nothing after it
    assert of([], 0.1) is None and of(curve, None).guess == 0
    assert "left the plateau at 40" in str(found) and "not in 30" in str(of(curve[:3], 0.1))


def test_median_counts_the_censored():
    """Kaplan and Meier by hand: S(2) = 4/5; one leaves at 3; S(4) = 4/5 * 2/3 = .533; S(6) = .533 / 2."""
    run = lambda left, followed: Convergence(left, None, followed, 0.0)
    runs = [run(2.0, 9.0), run(None, 3.0), run(4.0, 9.0), run(6.0, 9.0), run(None, 9.0)]
    found = times(runs, "left")
    assert (found.events, found.runs, found.median) == (3, 5, 6.0)
    assert found.low == pytest.approx(0.2307, abs=1e-3) and found.high == pytest.approx(0.8824, abs=1e-3)
    assert times(runs[:2] + runs[4:], "left").median is None
    assert times(runs, "reached") == (0, 5, 0.0, pytest.approx(0.4345, abs=1e-3), None)


def test_of_a_run(tmp_path):
    config = configs.resolve(tiny.config("python-stdlib:"))
    steps = [(1, 0.1, 0.0), (2, 0.95, 0.6), (3, 0.97, 0.95)]
    lines = [{"step": s, "loss": 1.0, "val_accuracy": a, "eval/parity@16": b} for s, a, b in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves.convergence(tmp_path, config)
    tokens = 8 * 16
    assert found["val_accuracy"] == Convergence(2 * tokens, 2 * tokens, 3 * tokens, 0.0)
    assert found["eval/parity@16"] == Convergence(3 * tokens, 3 * tokens, 3 * tokens, 0.5)
    assert convergence.RECORD.keys() <= found["val_accuracy"]._asdict().keys()
    lines = [line | {"val_bpb": 1.0} for line in lines]  # of text: no task
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(curves.convergence(tmp_path, config)) == ["eval/parity@16"]
    assert curves.convergence(tmp_path / "none", config) == {}


def test_in_the_report(tmp_path):
    """Seeds of gla without a full layer stay at 0.5 and 0.51, below half way from 0.1: censored at 2,000."""
    sweep_files.write(tmp_path)
    page = report.write(tmp_path).read_text()
    assert "Convergence" in page and "0 of 2\n0.00 to 0.66" in page and f"&gt; {quantity(2000, '')}" in page
    rows = (tmp_path / "results.csv").read_text().splitlines()
    head = rows[0].split(",")
    cells = {row.split(",")[0]: dict(zip(head, row.split(","), strict=False)) for row in rows[1:]}
    assert cells["gla_pure_0"]["left_tokens"] == "" and float(cells["full"]["reached_tokens"]) == 1000
