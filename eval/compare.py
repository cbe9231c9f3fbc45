"""Runs compared on the same samples: python -m eval.compare runs/a runs/b ...

The first run is the baseline. Reads what `python -m eval` kept in each workdir, and writes compare.html,
which needs no network, and compare.csv. Runs that were asked the same samples (tasks, lengths, seed, number,
tokenizer, haystack) are tested in pairs, and the tests of a run are corrected for their number.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from eval import heat, paired, runner
from eval.paired import Difference
from eval.runner import Result
from hybridlm import commands, untrusted
from hybridlm.errors import ConfigError
from hybridlm.report import quantity
from hybridlm.run import cli, private
from launch import figures, page

LAYERS = {"parameters": untrusted.NATURAL, "state_bytes": untrusted.NATURAL, "cache_bytes": untrusted.NATURAL,
          "seq_len": untrusted.NATURAL}  # fmt: skip
TOLD = "td.told { font-weight: 600; } td.better { color: #0a5c3a; } td.worse { color: #a02020; }"


class Run(NamedTuple):
    """A run's results. about: step, pattern, ... as eval.json and layers.json have them."""

    name: str
    about: dict[str, Any]
    results: dict[str, Result]


class Comparison(NamedTuple):
    """A run against the baseline. refused: "task@length" -> why it cannot be compared."""

    run: Run
    found: dict[str, Difference]
    refused: dict[str, str]

    def summary(self, baseline: str) -> str:
        told = [change for change in self.found.values() if change.told]
        better = sum(change.mean > 0 for change in told)
        said = f"{self.run.name} against {baseline}: of {len(self.found)} comparisons better in {better},"
        said += f" worse in {len(told) - better}, not to be told in {len(self.found) - len(told)}."
        if self.refused:
            said += f" {len(self.refused)} are not of the same samples."
        return said


def read(workdirs: Sequence[Path]) -> list[Run]:
    """ConfigError for fewer than two runs, and for one that was not evaluated."""
    if len(workdirs) < 2:
        raise ConfigError("runs", [str(w) for w in workdirs], "must be two or more workdirs")
    runs = []
    for workdir, name in zip(workdirs, names(workdirs), strict=True):
        if not (workdir / "eval.json").is_file():
            fix = f"Evaluate it first: {commands.typed('python -m eval')} --workdir=..."
            raise ConfigError("runs", str(workdir), "holds no eval.json", fix)
        about = runner.read_whole(workdir / "eval.json")
        results = about.pop("results")
        layers = workdir / "layers.json"
        if layers.is_file():
            about |= untrusted.read_json(layers, "layers.json", LAYERS)
        runs.append(Run(name, about, results))
    return runs


def names(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; ConfigError for one that is given twice."""
    whole = [Path(private.hide(untrusted.terminal(str(workdir.resolve())))).parts for workdir in workdirs]
    if len(set(whole)) < len(whole):
        raise ConfigError("runs", [str(w) for w in workdirs], "names a workdir twice")
    size = next(n for n in range(1, 1000) if len({parts[-n:] for parts in whole}) == len(whole))
    return ["/".join(parts[-size:]) for parts in whole]


def write(workdirs: Sequence[Path], folder: Path) -> Path:
    """compare.html and compare.csv in ``folder``, which is made if need be; the page's path."""
    runs = read(workdirs)
    baseline, *others = runs
    compared = [Comparison(run, *paired.differences(run.results, baseline.results)) for run in others]
    files = {"compare.csv": table(baseline, compared), "compare.html": html(baseline, compared)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        runner.put(folder / name, partial(untrusted.write_text, folder / name, text))
    return folder / "compare.html"


def measured(runs: Iterable[Run]) -> list[str]:
    """Every "task@length", tasks in the order of the runs, lengths ascending."""
    found: dict[str, dict[int, str]] = {}
    for run in runs:
        for name, result in run.results.items():
            found.setdefault(result["task"], {})[result["length"]] = name
    return [by_length[length] for by_length in found.values() for length in sorted(by_length)]


def table(baseline: Run, compared: Sequence[Comparison]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    head = ("run", "task", "length", "accuracy", "low", "high", "samples", "chance", "kept_bytes")
    rows.writerow([*head, "difference", "difference_low", "difference_high", "p", "p_holm", "not_compared"])
    for entry in (Comparison(baseline, {}, {}), *compared):
        for name, r in entry.run.results.items():
            change = entry.found.get(name)
            tested = ["", "", "", "", ""] if change is None else [f"{value:.6g}" for value in change]
            numbers = [r["length"], *(f"{r[key]:.6g}" for key in ("accuracy", "low", "high")), r["samples"]]
            chance = "" if r["chance"] is None else f"{r['chance']:.6g}"
            kept, refused = r.get("kept_bytes", ""), entry.refused.get(name, "")
            rows.writerow([entry.run.name, r["task"], *numbers, chance, kept, *tested, refused])
    return out.getvalue()


def html(baseline: Run, compared: Sequence[Comparison]) -> str:
    runs = [baseline, *(entry.run for entry in compared)]
    title = f"{', '.join(run.name for run in runs[1:])} against {baseline.name}"
    parts = [
        "".join(f"<p>{escape(entry.summary(baseline.name))}</p>" for entry in compared),
        _runs(runs),
        _pictures(baseline, compared),
        _accuracies(baseline, compared),
        _notes(runs, compared),
    ]
    return page.document(title, parts, TOLD)


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        about = run.about
        size = about.get("parameters")
        learnt = about.get("convergence", {})
        kept = None if size is None else about["state_bytes"] + about["cache_bytes"]
        rows.append(
            [
                (run.name, ""),
                (str(about.get("pattern", "")), ""),
                (f"{step:,}" if isinstance(step := about.get("step"), int) else "", "number"),
                ("" if size is None else f"{size:,}", "number"),
                ("" if kept is None else f"{quantity(kept, 'B')} at {about['seq_len']:,}", "number"),
                ("\n".join(f"{name}: {_learnt(one)}" for name, one in learnt.items()), ""),
            ]
        )
    head = ["run", "pattern", "step", "parameters", "state + KV of a sequence", "while training"]
    last = len(head) if any(row[-1][0] for row in rows) else len(head) - 1
    return "<h2>Runs</h2>" + _table(head[:last], [row[:last] for row in rows])


def _learnt(one: dict[str, Any]) -> str:
    """When it left the plateau and reached 90%; a > says that it had not by then."""
    when = lambda t: f"> {quantity(one['followed'], '')}" if t is None else quantity(t, "")
    return f"left the plateau after {when(one['left'])} tokens, 90% after {when(one['reached'])}"


def _accuracies(baseline: Run, compared: Sequence[Comparison]) -> str:
    """A row for each task and length: the baseline's accuracy, then each run's with the difference."""
    rows = []
    for name in measured([baseline, *(entry.run for entry in compared)]):
        task, _, length = name.rpartition("@")
        cells = [(f"{task}\n{int(length):,} tokens", ""), (_value(baseline.results.get(name)), "number")]
        for entry in compared:
            cells.append((_value(entry.run.results.get(name)), "number"))
            change = entry.found.get(name)
            kind = "number" if change is None or not change.told else "number told"
            kind += "" if change is None or not change.told else " better" if change.mean > 0 else " worse"
            refused = "not the same samples" if name in entry.refused else ""
            cells.append((refused if change is None else _change(change), kind))
        rows.append(cells)
    head = ["task", baseline.name]
    for entry in compared:
        head += [entry.run.name, f"less {baseline.name}"]
    note = (
        "Accuracy, below it its 95% interval (Wilson) and the bytes of states, keys and values that the run"
        " keeps of such a context. Differences: of the same samples, with a 95% interval,"
        " and the p of no difference (McNemar's exact test, or sign flips where a sample's score is a share),"
        " corrected by Holm for all comparisons of the run. Bold: below 0.05."
    )
    return f"<h2>Accuracy</h2>{_table(head, rows)}{page.note(note)}"


def _value(result: Result | None) -> str:
    if result is None:
        return ""
    kept = f"\n{quantity(result['kept_bytes'], 'B')}" if "kept_bytes" in result else ""
    return f"{result['accuracy']:.3f}\n{result['low']:.3f} to {result['high']:.3f}{kept}"


def _change(change: Difference) -> str:
    p = "<0.001" if change.holm < 0.001 else f"{change.holm:.3f}"
    return f"{change.mean:+.3f} (p {p})\n{change.low:+.3f} to {change.high:+.3f}"


def _pictures(baseline: Run, compared: Sequence[Comparison]) -> str:
    runs = [baseline, *(entry.run for entry in compared)]
    every = measured(runs)
    rows = list(dict.fromkeys(name.rpartition("@")[0] for name in every))
    columns = sorted({int(name.rpartition("@")[2]) for name in every})
    parts = ["<h2>Task by length</h2>", '<div class="pictures">']
    for run in runs:
        parts.append(
            _figure(heat.accuracies(run.results, rows, columns, run.name), f"Accuracy of {run.name}.")
        )
    for entry in compared:
        if entry.found:
            drawn = heat.changes(entry.found, rows, columns, f"{entry.run.name} less {baseline.name}")
            caption = "Blue: better than the baseline. Bold and starred: p below 0.05, corrected."
            parts.append(_figure(drawn, caption))
    parts.append("</div>")
    asked = {n: r for run in runs for n, r in run.results.items() if "by_turn" in r}
    if asked:
        parts += ["<h2>Accuracy by turn</h2>", '<div class="pictures">']
        by_run = {run.name: run.results for run in runs}
        for task in dict.fromkeys(result["task"] for result in asked.values()):
            length = max(result["length"] for result in asked.values() if result["task"] == task)
            drawn = heat.turns(by_run, task, length)
            parts.append(_figure(drawn, "Questions on one context, which is read once."))
        parts.append("</div>")
    return "".join(parts)


def _figure(figure: Figure, caption: str) -> str:
    return page.figure(figures.png(figure), caption)


def _notes(runs: Sequence[Run], compared: Sequence[Comparison]) -> str:
    counts = sorted({result["samples"] for run in runs for result in run.results.values()})
    told = [
        f"{paired.detectable(count, 0.25):.2f} for {count:,} samples"
        for count in counts[:3] + counts[3:][-1:]
    ]
    lines = [
        "What can be told: if a quarter of the samples changes either way, a single test finds with a power"
        f" of 80% a difference of {', '.join(told)}; corrected for several it takes more."
    ]
    for entry in compared:
        reasons: dict[str, list[str]] = {}
        for name, why in entry.refused.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"{entry.run.name}, not compared ({why}): {', '.join(n)}." for why, n in reasons.items()]
    return "".join(map(page.note, [*lines, "The same numbers are in compare.csv."]))


def _table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """rows: of (text, class)."""
    rows = list(rows)
    numbers = [kind.startswith("number") for _, kind in rows[0]] if rows else [False] * len(head)
    plain = zip(head, numbers, strict=True)
    return page.table([(name, "number" if number else "") for name, number in plain], rows)


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=commands.called("python -m eval.compare"), description=__doc__, formatter_class=raw
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="WORKDIR", help="the first is the baseline")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the folder that holds the first run"
    )
    flags = parser.parse_args(argv)

    def compare() -> None:
        folder = flags.out or flags.runs[0].resolve().parent
        if folder.exists() and not folder.is_dir():
            raise ConfigError("--out", str(folder), "is no folder")
        print(f"written: {untrusted.terminal(private.hide(str(write(flags.runs, folder))))}")

    return cli.run(compare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
