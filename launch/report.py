"""The report of a sweep: python -m launch.report runs/ratio_mqar

Writes report.html, which needs no network, the pictures in it as PNGs, and results.csv, from whatever the
runs have left so far.
"""

import argparse
import base64
import math
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hybridlm.report import quantity
from hybridlm.run import cli
from launch import figures, results
from launch.results import Mean, Result

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 68rem; }
body { padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { max-width: 44rem; } .facts, figcaption, .note { color: #555; font-size: .9rem; }
.pictures { display: grid; gap: 1rem; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; max-width: 46rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; } th { border-color: #888; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .85em; overflow-wrap: anywhere; } .bad { color: #a02020; }
"""
TITLES = {"recall": "Recall", "loss": "Held-out loss"}


def write(workdir: str | Path) -> Path:
    """report.html and what belongs to it, in the sweep's folder; its path. ConfigError without a sweep."""
    workdir = Path(workdir)
    record, found = results.read(workdir)
    results.write_csv(found, workdir / "results.csv")
    body = [_head(record, found)]
    for metric in TITLES:
        measured = results.means(found, metric)
        if measured:
            body.append(_by_layers(measured, metric))
            body.append(_pictures(measured, found, metric, workdir))
            body.append(_budgets(measured, metric))
    body += [_runs(found), _notes(found)]
    title = escape(f"Sweep {workdir.resolve().name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(body)}</body></html>\n"
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def _head(record: dict[str, Any], found: Sequence[Result]) -> str:
    states = [result.state for result in found]
    order = ("finished", "failed", "running", "queued")
    counts = ", ".join(f"{states.count(state)} {state}" for state in order if state in states)
    sizes = dict.fromkeys(quantity(size, "") for size in sorted(result.parameters for result in found))
    tokens = dict.fromkeys(quantity(count, "") for count in sorted(result.tokens for result in found))
    spread = lambda values: " to ".join(dict.fromkeys((next(iter(values)), next(reversed(values)))))
    text = f"{len(found)} runs: {counts}. {spread(sizes)} parameters, {spread(tokens)} training tokens each."
    if record["machines"]:
        text += " Trained on " + "; ".join(record["machines"]) + "."
    return f'<p class="facts">{escape(text)}<br><code>{escape(record.get("command", ""))}</code></p>'


def _by_layers(measured: Sequence[Mean], metric: str) -> str:
    """Mixer by mixer, from no full layer to all."""
    series = results.by_mixer(measured)
    columns = {m.fraction: f"{len(m.runs[0].full_layers)} of {m.runs[0].num_layers}" for m in measured}
    shares = sorted({mean.fraction for line in series.values() for mean in line})
    rows = []
    for mixer, line in series.items():
        at = {mean.fraction: _value(mean) for mean in line}
        rows.append([mixer, *(at.get(share, "") for share in shares)])
    seeds = max(len(mean.runs) for mean in measured)
    over = f"Means over up to {seeds} seeds, ± half the 95% interval." if seeds > 1 else "One seed each."
    rates = {run.point.get(name) for mean in measured for run in mean.runs for name in results.RATE} - {None}
    chosen = " Of several learning rates the best for each point." if len(rates) > 1 else ""
    note = f"{figures.NAMES[metric].capitalize()}. {over}{chosen}"
    head = ["mixer \\ full layers", *(columns[share] for share in shares)]
    return f"<h2>{TITLES[metric]} by full-attention layers</h2>{_table(head, rows)}{_note(note)}"


def _value(mean: Mean) -> str:
    return f"{mean.value:.3f}" + ("" if math.isnan(mean.half) else f" ± {mean.half:.3f}")


def _pictures(measured: Sequence[Mean], found: Sequence[Result], metric: str, workdir: Path) -> str:
    drawn = {
        "by_fraction": (
            figures.over_fraction(measured, metric),
            "A line for each linear mixer, to attention alone where that ran. Bands: 95% over seeds.",
        ),
        "by_placement": (
            figures.placements(measured, metric),
            "The same number of full layers at different places.",
        ),
        "by_bytes": (
            figures.pareto(measured, metric, "bytes"),
            "Decode memory: recurrent states and KV cache of one sequence of the training length.",
        ),
        "by_speed": (
            figures.pareto(measured, metric, "tokens_per_second"),
            "Training speed inside the sweep: runs that share a device or a program slow each other down.",
        ),
        "curves": (figures.curves(found, metric), "Every run while it trained."),
    }
    parts = []
    for name, (figure, caption) in drawn.items():
        if figure is None:
            continue
        png = figures.png(figure)
        (workdir / f"{metric}_{name}.png").write_bytes(png)
        wide = ' class="wide"' if name == "curves" else ""
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        alt = f"{metric} {name.replace('_', ' ')}"
        image = f'<img alt="{alt}" src="{source}">'
        parts.append(f"<figure{wide}>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pictures">{"".join(parts)}</div>'


def _budgets(measured: Sequence[Mean], metric: str) -> str:
    rows = []
    for budget, mean in results.under_budgets(measured, metric):
        run = mean.runs[0]
        layers = ", ".join(map(str, run.full_layers)) or "none"
        rows.append([quantity(budget, "B"), run.mixer, run.point.get("ratio", ""), layers, _value(mean)])
    head = ["budget from", "mixer", "ratio", "full layers", metric]
    note = "State and KV cache of one sequence. A row holds up to the budget of the next."
    return f"<h2>Best under a budget of bytes</h2>{_table(head, rows)}{_note(note)}"


def _runs(found: Sequence[Result]) -> str:
    rows = []
    for r in found:
        layers = "all" if r.fraction == 1 else ", ".join(map(str, r.full_layers)) or "none"
        measured = [f"{value:.4f}" if value is not None else "" for value in (r.recall, r.loss)]
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second else ""
        state = f"failed: {r.error}" if r.state == "failed" else r.state
        rows.append([r.name, layers, f"{r.parameters:,}", quantity(r.bytes, "B"), *measured, speed, state])
    head = ["run", "full layers", "parameters", "state + KV", "recall", "loss", "tokens/s", ""]
    return f"<h2>Runs</h2>{_table(head, rows)}"


def _notes(found: Sequence[Result]) -> str:
    missing = [r.name for r in found if r.state != "finished"]
    note = "Every run finished."
    if missing:
        note = (
            f"{len(missing)} of {len(found)} runs did not finish and are in no figure: {', '.join(missing)}."
        )
    return _note(f"{note} Full layers are counted from 0. The same numbers are in results.csv.")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        kind = (
            ' class="number"' if text[:1].isdigit() else ' class="bad"' if text.startswith("failed") else ""
        )
        return f"<td{kind}>{escape(text)}</td>"

    lines = ["".join(f"<th>{escape(text)}</th>" for text in head), *("".join(map(cell, row)) for row in rows)]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch.report", description=__doc__, formatter_class=raw)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args(argv).workdir
    return cli.run(lambda: print(f"written: {write(workdir)}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
