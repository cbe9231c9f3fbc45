"""The report of a sweep: python -m launch.report runs/ratio_mqar

Writes report.html, which needs no network, the pictures in it as PNGs, and results.csv, from whatever the
runs have left so far.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval import convergence
from hybridlm import commands, untrusted
from hybridlm.errors import RunError
from hybridlm.report import quantity
from hybridlm.run import cli, private
from launch import figures, page, results
from launch.results import Mean, Result

TITLES = {"recall": "Recall", "loss": "Held-out loss"}
PICTURES = ("by_fraction", "by_placement", "by_bytes", "by_speed", "curves")


def write(workdir: str | Path) -> Path:
    """report.html and what belongs to it, in the sweep's folder; its path.

    ConfigError without a sweep, RunError where the disk refuses; each file is the old one or the new one.
    """
    workdir = Path(workdir)
    record, found = results.read(workdir)
    pictures: dict[str, bytes] = {}
    body = [_head(record, found)]
    for metric in TITLES:
        measured = results.means(found, metric)
        if measured:
            body.append(_by_layers(measured, metric))
            body.append(_pictures(measured, found, metric, pictures))
            body.append(_budgets(measured, metric))
            if metric == "recall":
                body.append(_convergence(measured))
    body += [_runs(found), _notes(found)]
    title = f"Sweep {Path(private.shown(str(workdir.resolve()))).name}"
    html = page.document(title, body).encode()
    files = {"results.csv": results.table(found).encode(), **pictures, "report.html": html}
    try:
        for name in (f"{metric}_{picture}.png" for metric in TITLES for picture in PICTURES):
            if name not in files:
                (workdir / name).unlink(missing_ok=True)  # of an earlier report, which this one would belie
        for name, data in files.items():
            untrusted.write_bytes(workdir / name, data)
    except OSError as error:
        raise RunError(f"{workdir}: the report cannot be written ({error.strerror or error}).") from error
    return workdir / "report.html"


def _head(record: dict[str, Any], found: Sequence[Result]) -> str:
    states = [result.state for result in found]
    order = ("finished", "failed", "running", "queued")
    counts = ", ".join(f"{states.count(state)} {state}" for state in order if state in states)
    spread = lambda values, unit: " to ".join(
        dict.fromkeys(quantity(v, unit) for v in (min(values), max(values)))
    )
    parts = [f"{len(found)} runs: {counts or 'none'}."]
    if found:
        sizes, tokens = [r.parameters for r in found], [r.tokens for r in found]
        parts.append(f"{spread(sizes, '')} parameters, {spread(tokens, '')} training tokens each.")
    if record["machines"]:
        parts.append(f"Trained on {', '.join(record['machines'])}.")
    dates = sorted({result.date for result in found} - {""})
    if dates:
        parts.append(" to ".join(dict.fromkeys((dates[0], dates[-1]))) + ".")
    return (
        f'<p class="facts">{page.prose(" ".join(parts))}<br><code>{page.prose(record["command"])}</code></p>'
    )


def _by_layers(measured: Sequence[Mean], metric: str) -> str:
    """Mixer by mixer, from no full layer to all."""
    series = results.by_mixer(measured)
    columns = {m.fraction: f"{len(m.runs[0].full_layers)} of {m.runs[0].num_layers}" for m in measured}
    shares = sorted({mean.fraction for line in series.values() for mean in line})
    rows = []
    for label, line in series.items():
        at = {mean.fraction: _value(mean) for mean in line}
        rows.append([label, *(at.get(share, "") for share in shares)])
    seeds = max(len(mean.runs) for mean in measured)
    over = f"Means over up to {seeds} seeds, below them 95% intervals." if seeds > 1 else "One seed each."
    rates = {run.point.get(name) for mean in measured for run in mean.runs for name in results.RATE} - {None}
    chosen = " Of the learning rates with the most seeds the best for each point." if len(rates) > 1 else ""
    known = [run.guess[metric] for mean in measured for run in mean.runs]
    levels = sorted({level for level in known if level is not None})
    guess = f" Guessing gets {' or '.join(f'{level:.3f}' for level in levels)}." if levels else ""
    note = f"{figures.NAMES[metric].capitalize()}. {over}{chosen}{guess}"
    head = [CORNER, *(columns[share] for share in shares)]
    return f"<h2>{TITLES[metric]} by full-attention layers</h2>{_table(head, rows)}{page.note(note)}"


def _value(mean: Mean) -> str:
    return f"{mean.value:.3f}" + ("" if math.isnan(mean.low) else f"\n{mean.low:.3f} to {mean.high:.3f}")


def _pictures(
    measured: Sequence[Mean], found: Sequence[Result], metric: str, pictures: dict[str, bytes]
) -> str:
    """The figures that there are something for; their PNGs go to ``pictures`` by file name."""
    bands = "" if all(math.isnan(mean.low) for mean in measured) else " Bands: 95% over seeds."
    drawn = {
        "by_fraction": (
            figures.over_fraction(measured, metric),
            f"A line for each linear mixer, to attention alone where that ran.{bands}",
        ),
        "by_placement": (
            figures.placements(measured, metric),
            "The same number of full layers at different places.",
        ),
        "by_bytes": (
            figures.pareto(measured, metric, "bytes"),
            "Decode memory: recurrent states and KV cache of one sequence of the training length. "
            "Ringed: nothing that needs less is better.",
        ),
        "by_speed": (
            figures.pareto(measured, metric, "tokens_per_second"),
            "Training speed of runs that had the device to themselves, all on the same kind of device.",
        ),
        "curves": (
            figures.curves(found, metric),
            "Every run while it trained, thin; the means of those that finished.",
        ),
    }
    parts = []
    for name, (figure, caption) in drawn.items():
        if figure is None:
            continue
        png = pictures[f"{metric}_{name}.png"] = figures.png(figure)
        several = figure.get_figwidth() > figures.SIZE[0]  # panels, a mixer each
        parts.append(page.figure(png, caption, f"{metric} {name.replace('_', ' ')}", wide=several))
    return f'<div class="pictures">{"".join(parts)}</div>'


def _budgets(measured: Sequence[Mean], metric: str) -> str:
    rows = []
    for budget, mean in results.under_budgets(measured, metric):
        run = mean.runs[0]
        layers = ", ".join(map(str, run.full_layers)) or "none"
        ratio, value = run.point.get("ratio", ""), _value(mean).replace("\n", " · ")
        rows.append([quantity(budget, "B"), run.label, ratio, layers, value])
    head = ["budget from", "mixer", "ratio", "full layers", metric]
    note = "State and KV cache of one sequence. A row holds up to the budget of the next."
    return f"<h2>Best {metric} under a budget of bytes</h2>{_table(head, rows)}{page.note(note)}"


def _convergence(measured: Sequence[Mean]) -> str:
    """When the runs of each point learnt the task; "" where none was looked at more than once."""
    rows = []
    for mean in sorted(measured, key=lambda m: (m.label, m.fraction, m.runs[0].full_layers)):
        known = [run.convergence for run in mean.runs if len(run.curves["recall"]) > 1]
        seen = [one for one in known if one is not None]
        if not seen:
            continue
        cells = [_times(convergence.times(seen, what), seen) for what in ("left", "reached")]
        learnt = [run.recall for run in mean.runs if run.recall is not None and run.left_tokens is not None]
        best = f"{sum(learnt) / len(learnt):.3f}" if learnt else ""
        layers = ", ".join(map(str, mean.runs[0].full_layers)) or "none"
        rows.append([mean.label, "all" if mean.fraction == 1 else layers, *cells[0], *cells[1], best])
    if not rows:
        return ""
    head = ["mixer", "full layers", "left the plateau", "after tokens", "reached 90%", "after tokens",
            "recall of those that left"]  # fmt: skip
    note = (
        "Of the finished runs, how many left the plateau (half way from guessing to 1) and how many reached "
        "90%, at two evaluations in a row, with the 95% interval of that share (Wilson). Tokens: the median "
        "(Kaplan and Meier), runs that did not get there counting as long as they were looked at; a > says "
        "that fewer than half did by then."
    )
    return f"<h2>Convergence</h2>{_table(head, rows)}{page.note(note)}"


def _times(found: convergence.Times, runs: Sequence[convergence.Convergence]) -> list[str]:
    share = f"{found.events} of {found.runs}\n{found.low:.2f} to {found.high:.2f}"
    longest = max(run.followed for run in runs)
    return [share, f"> {quantity(longest, '')}" if found.median is None else quantity(found.median, "")]


def _runs(found: Sequence[Result]) -> str:
    """A row for each run; a column in which no run has anything is left out."""
    optional = lambda value, form: "" if value is None else format(value, form)
    rows = [
        {
            "run": r.name,
            "state": r.state,
            "full layers": "all" if r.fraction == 1 else ", ".join(map(str, r.full_layers)) or "none",
            "learning rate": optional(r.learning_rate, ".3g"),
            "width": optional(r.width, "d"),
            "parameters": f"{r.parameters:,}",
            "tokens": quantity(r.tokens, ""),
            "state + KV": quantity(r.bytes, "B"),
            "recall": optional(r.recall, ".4f"),
            "90% after": "" if r.reached_tokens is None else quantity(r.reached_tokens, ""),
            "loss": optional(r.loss, ".4f"),
            "tokens/s": optional(r.tokens_per_second, ",.0f"),
            "commit": r.commit,
            "date": r.date,
            "error": r.error,
        }
        for r in found
    ]
    head = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    return f"<h2>Runs</h2>{_table(head, [[row[name] for name in head] for row in rows])}"


def _notes(found: Sequence[Result]) -> str:
    missing = [r.name for r in found if r.state != "finished"]
    names = ", ".join(missing)
    note = "Every run finished."
    if missing:
        note = f"{len(missing)} of {len(found)} runs did not finish and are in no figure: {names}."
    for metric, title in TITLES.items():
        of_all = {r.name: getattr(r, metric) for r in found if r.state == "finished"}
        lacking = [name for name, value in of_all.items() if value is None]
        if lacking and len(lacking) < len(of_all):
            note += f" {title}: not a number at the end of {', '.join(lacking)}, in no figure of it."
    note += " Full layers are counted from 0."
    if len(missing) < len(found) and not any(r.tokens_per_second for r in found):
        note += " No speed is shown: these runs shared a device or a program, or ran on different ones."
    return page.note(f"{note} The same numbers are in results.csv.")


CORNER = "mixer \\ full layers"
TEXTS = {"run", "state", "mixer", CORNER, "ratio", "full layers", "commit", "date", "error"}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers, also of those with a > before them, stand to the right, their names too."""
    rows = list(rows)

    def kind(name: str, column: int) -> str:
        if name in TEXTS:
            return "bad" if name == "error" else ""
        return "number" if any(row[column].lstrip("> ")[:1].isdigit() for row in rows) else ""

    kinds = [kind(name, column) for column, name in enumerate(head)]
    heads = [(name, one.replace("bad", "")) for name, one in zip(head, kinds, strict=True)]
    return page.table(heads, (list(zip(row, kinds, strict=True)) for row in rows))


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=commands.called("python -m launch.report"), description=__doc__, formatter_class=raw
    )
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args(argv).workdir
    return cli.run(lambda: print(private.shown(f"written: {write(workdir)}")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
