"""Intervals over seeds are those of a t test, the page has them, and runs of a sweep join the CSVs."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import study_intervals
from tests import sweep_files

STUDIES = Path(__file__).parents[1] / "docs/studies"


def test_two_stacks_are_a_t_test():
    a, b = [1.0, 1.3, 0.9], [0.2, 0.5]
    mean, half = study_intervals.difference({"a": a, "b": b}, [("a", "b")])
    low, high = stats.ttest_ind(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), (low, high))


def test_one_seed_has_the_deviation_of_the_others():
    """Of two pairs the mean, whose variance is that of four means over four."""
    stacks = {"a": [1.0, 1.2], "b": [0.0], "c": [3.0], "d": [1.0, 1.4]}
    mean, half = study_intervals.difference(stacks, [("a", "b"), ("c", "d")])
    deviation = np.sqrt((0.02 + 0.08) / 2)
    assert mean == pytest.approx((1.1 + 1.8) / 2)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * deviation * np.sqrt(3) / 2)
    assert study_intervals.difference(stacks, [("a", "e")]) is None
    assert study_intervals.pooled({"b": [0.0]})[1] == 0


def test_the_page_has_these_numbers():
    read = [study_intervals.read(STUDIES / name) for name in (study_intervals.LOSSES, study_intervals.RECALL)]
    found = study_intervals.ends(*read)
    wanted = study_intervals.wanted(found["bits a byte"])
    page = (STUDIES / "ratio.md").read_text().replace("*", "")
    rows = re.findall(r"^\| ([^|]* less [^|]*) \| (.*) \|$", page, re.MULTILINE)
    for (said, cells), asked in zip(rows, wanted.values(), strict=True):
        for cell, metric in zip(cells.split(" | "), study_intervals.METRICS, strict=True):
            told = [float(part) for part in cell.split(" +- ")]
            assert told == pytest.approx(study_intervals.difference(found[metric], asked), abs=0.0051), said


def test_runs_join(tmp_path, monkeypatch, capsys):
    shutil.copytree(STUDIES, tmp_path / "studies")
    sweep_files.write(tmp_path / "runs", text=True)
    one = {
        "of": "text",
        "length": 1024,
        "bits": 1.0,
        "half": 0.1,
        "saved": 0.25,
        "saved_half": 0.1,
        "exact": 0.0,
    }
    (tmp_path / "copies.json").write_text(json.dumps({"kda_3:1_1": [one], "stranger": [one]}))
    flags = ["--studies", "studies", "--runs", "runs", "--copies", "copies.json", "--write"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study_intervals", *flags])
    study_intervals.main()
    capsys.readouterr()
    losses, recall = (
        study_intervals.read(Path("studies") / n) for n in ("ratio_lm_60m.csv", "ratio_recall_60m.csv")
    )
    of = lambda rows, run, seed: [one for one in rows if (one["run"], one["seed"]) == (run, seed)]
    assert [one["tokens"] for one in of(losses, "kda_3-1", "1")] == ["1000", "2000"]
    assert [one["saved"] for one in of(recall, "kda_3-1", "1")] == ["0.25"]
    old = study_intervals.read(STUDIES / "ratio_lm_60m.csv")
    assert of(losses, "full_full", "1") == of(old, "full_full", "1") != []
    assert not of(losses, "gla_pure", "2")  # it failed
