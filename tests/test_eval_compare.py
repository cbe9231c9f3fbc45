"""Runs compared: tests against their definitions, the page against what was put in."""

import csv
import itertools
import json

import numpy as np
import pytest

from eval import compare, paired, runner
from hybridlm.errors import ConfigError

BASE = {"step": 10, "samples": 40, "seed": 0, "tokenizer": "bytes", "haystack": "h", "data_dir": ""}


def result(task, length, scores, identity=BASE, **fields):
    numbers = runner._numbers(np.array(scores, float))
    about = {"task": task, "length": length, "chance": 0.1, "source": "here", "identity": identity}
    return about | numbers | fields


def put(folder, results, **about):
    folder.mkdir()
    named = {f"{r['task']}@{r['length']}": r for r in results}
    runner.write(folder / "eval.json", named, {"step": 10, "pattern": "kda*3 full", **about})
    return folder


def scores(right, seed, count=40):
    return (np.random.default_rng(seed).random(count) < right).astype(float)


def test_p_is_mcnemars_and_that_of_all_sign_flips():
    run, baseline = [1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    # Five changes one way, one the other: 2 P(Binomial(6, 1/2) <= 1).
    assert paired.difference(run, baseline).p == pytest.approx(2 * (1 + 6) / 64)
    assert paired.difference(baseline, run).p == pytest.approx(2 * (1 + 6) / 64)
    assert paired.difference(run, run).p == 1.0
    change = np.array([0.5, 0.25, 0.75, -0.25, 0.5])
    flips = [abs(np.dot(signs, change)) for signs in itertools.product((1, -1), repeat=5)]
    want = np.mean([value >= abs(change.sum()) - 1e-9 for value in flips])
    assert paired.difference(0.25 + change, [0.25] * 5).p == pytest.approx(want)


def test_interval_is_agresti_and_mins():
    """With half a sample added to each of the four cells."""
    both, gained, lost, neither = 12, 9, 3, 16
    run = [1] * both + [1] * gained + [0] * lost + [0] * neither
    baseline = [1] * both + [0] * gained + [1] * lost + [0] * neither
    found = paired.difference(run, baseline)
    b, c, n = gained + 0.5, lost + 0.5, len(run) + 2
    half = 1.959964 * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half))
    same = paired.difference([1] * 5, [1] * 5)
    assert same.low < 0 < same.high  # equal on five samples is not known to be equal
    all_gained = paired.difference([1] * 50, [0] * 50)
    assert all_gained.high == 1 and all_gained.low > 0.85


def test_the_interval_covers():
    """Of 2,000 pairs of runs with known rates at least 94% of the intervals hold the true difference."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        cells = rng.choice(4, size=60, p=[0.4, 0.25, 0.05, 0.3])
        found = paired.difference(np.isin(cells, (0, 1)), np.isin(cells, (0, 2)))
        held += found.low <= 0.2 <= found.high
    assert held / 2000 > 0.94


def test_holm():
    given = {
        name: paired.Difference(0, 0, 0, p) for name, p in zip("abcd", (0.04, 0.01, 0.03, 0.02), strict=True)
    }
    assert [paired.holm(given)[name].holm for name in "abcd"] == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert list(paired.holm(given)) == list("abcd") and paired.holm({}) == {}


def test_what_was_not_asked_the_same_is_not_compared():
    mine = {f"t@{n}": result("t", n, scores(0.5, n)) for n in (1, 2, 3, 4, 5)}
    other = {f"t@{n}": result("t", n, scores(0.5, n)) for n in (1, 2, 3, 4)}
    other["t@2"]["identity"] = BASE | {"tokenizer": "x", "seed": 3}
    other["t@3"].pop("scores")
    other["t@1"]["identity"] = BASE | {"step": 77, "ends": [2]}
    found, refused = paired.differences(mine, other)
    assert set(found) == {"t@1", "t@4"} and found["t@4"].mean == 0
    assert refused == {"t@2": "another seed, tokenizer",
                       "t@3": "measured by an older version, without the scores of samples"}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    turns = np.linspace(1, 0.2, 5) * np.ones((40, 1))
    common = [result("passkey", n, scores(0.9, n)) for n in (1024, 2048)]
    a = put(tmp_path / "a<b>&", [*common, result("needles_turns", 1024, turns)])
    better = [result("passkey", 1024, [1] * 40, kept_bytes=3 << 20), result("passkey", 2048, [0] * 40)]
    b = put(tmp_path / "b", [*better, result("needles_turns", 1024, turns), result("S3", 64, [0.5] * 40)])
    layers = {"parameters": 1234567, "state_bytes": 1 << 20, "cache_bytes": 1 << 20, "seq_len": 2048}
    (b / "layers.json").write_text(json.dumps(layers))
    return a, b


def test_the_page_and_the_table_say_the_same(folders, capsys):
    a, b = folders
    assert compare.main([str(a), str(b)]) == 0
    assert "compare.html" in capsys.readouterr().out
    text = (a.parent / "compare.html").read_text()
    assert "a&lt;b&gt;&amp;" in text and "a<b>" not in text  # names are text
    assert text.count("data:image/png;base64,") == 4 and "http" not in text.split("</style>")[1]
    assert ("1,234,567" in text and "2.1 MB at 2,048" in text) or "2.0 MiB at 2,048" in text
    with open(a.parent / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    [worse] = [row for row in rows if row["run"] == "b" and row["length"] == "2048"]
    assert float(worse["difference"]) == pytest.approx(-scores(0.9, 2048).mean())
    assert float(worse["p_holm"]) < 1e-6
    assert f"{float(worse['difference']):+.3f}" in text and "worse in 1" in text
    [alone] = [row for row in rows if row["task"] == "S3"]
    assert alone["difference"] == "" and alone["kept_bytes"] == "" and "3.15 MB" in text
    kept = {(row["run"], row["task"], row["length"]): row["kept_bytes"] for row in rows}
    assert kept["b", "passkey", "1024"] == "3145728" and kept["b", "passkey", "2048"] == ""


def test_bad_input(folders, tmp_path, capsys):
    a, b = map(str, folders)
    for given, said in (([a], "two or more"), ([a, a], "twice"), ([a, str(tmp_path)], "no eval.json")):
        assert compare.main([*given, "--out", str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()
        assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert compare.main([a, b, "--out", str(tmp_path / "file")]) == 2
    (folders[1] / "eval.json").write_text('{"results": {"x": {"task": 3}}}')
    assert compare.main([a, b]) == 1
    assert "not a file of results" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "x"]
    assert compare.names(paths)[:2] == ["one/run", "two/run"]
    with pytest.raises(ConfigError, match="twice"):
        compare.names([paths[0], tmp_path / "one" / "." / "run"])
