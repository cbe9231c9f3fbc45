"""The report of a sweep: python -m launch.report runs/ratio_mqar

Writes report.html, which needs no network, the pictures in it as PNGs, and results.csv, from whatever the
runs have left so far.
"""

import argparse
import base64
import html
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.report import quantity
from launch import figures, results
from launch.results import Mean, Result

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 68rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { max-width: 44rem; } .facts, figcaption, .note { color: #555; font-size: .9rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; max-width: 46rem; } img { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
code { font-size: .85em; overflow-wrap: anywhere; } .bad { color: #a02020; }
"""


def write(workdir: str | Path) -> Path:
    """report.html and what belongs to it, in the sweep's folder; its path. ConfigError without a sweep."""
    workdir = Path(workdir)
    record, found = results.read(workdir)
    results.write_csv(found, workdir / "results.csv")
    body = [_head(record, found)]
    for metric in ("recall", "loss"):
        measured = results.means(found, metric)
        if measured:
            body.append(_findings(measured, metric))
            body.append(_pictures(measured, found, metric, workdir))
            body.append(_budgets(measured, metric))
    body += [_runs(found), _notes(found)]
    title = html.escape(f"Sweep {workdir.name}")
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
    counts = ", ".join(
        f"{states.count(s)} {s}" for s in ("finished", "failed", "running", "queued") if s in states
    )
    tokens, sizes = {r.tokens for r in found}, [r.parameters for r in found]
    low, high = min(sizes), max(sizes)
    size = (
        f"{quantity(low, '')}"
        if quantity(low, "") == quantity(high, "")
        else f"{quantity(low, '')} to {quantity(high, '')}"
    )
    lines = [
        f"{len(found)} runs: {counts}.",
        f"{size} parameters, {' or '.join(quantity(t, '') for t in sorted(tokens)[:4])} training tokens each.",
    ]
    if record.get("machines"):
        lines.append("Trained on " + "; ".join(record["machines"]) + ".")
    command = html.escape(record.get("command", ""))
    return f'<p class="facts">{" ".join(lines)}<br><code>{command}</code></p>'


def _findings(measured: Sequence[Mean], metric: str) -> str:
    """What the numbers say, mixer by mixer, in a table: from no full layer to all."""
    series = results.by_mixer(measured)
    shares = sorted({mean.fraction for line in series.values() for mean in line})
    sample = {mean.fraction: mean.runs[0] for line in series.values() for mean in line}
    head = "".join(f"<th>{len(sample[s].full_layers)} of {sample[s].num_layers}</th>" for s in shares)
    rows = []
    for mixer, line in series.items():
        at = {mean.fraction: mean for mean in line}
        rows.append(
            f"<tr><td>{html.escape(mixer)}</td>{''.join(f'<td>{_value(at.get(s))}</td>' for s in shares)}</tr>"
        )
    seeds = max(len(mean.runs) for mean in measured)
    over = (
        f"means over up to {seeds} seeds, with half the 95% interval"
        if seeds > 1
        else "one seed each, so no intervals"
    )
    return (
        f"<h2>{'Recall' if metric == 'recall' else 'Held-out loss'} by full-attention layers</h2>"
        f'<div class="scroll"><table><tr><th>mixer \\ full layers</th>{head}</tr>{"".join(rows)}</table></div>'
        f'<p class="note">{figures.NAMES[metric]}; {over}.</p>'
    )


def _value(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.value:.3f}" + ("" if math.isnan(mean.half) else f" ± {mean.half:.3f}")


def _pictures(measured: Sequence[Mean], found: Sequence[Result], metric: str, workdir: Path) -> str:
    drawn = {
        f"{metric}_by_fraction": (
            figures.over_fraction(measured, metric),
            "Each line is a linear mixer; its last point is attention alone. Bands are 95% intervals over seeds.",
        ),
        f"{metric}_by_placement": (figures.placements(measured, metric), "The same number of full layers at different places."),
        f"{metric}_by_bytes": (
            figures.pareto(measured, metric, "bytes"),
            "Decode memory: recurrent states and KV cache of one sequence of the training length.",
        ),
        f"{metric}_by_speed": (
            figures.pareto(measured, metric, "tokens_per_second"),
            "Training speed inside the sweep. Runs that share a device slow each other down; compare with care.",
        ),
        f"{metric}_curves": (figures.curves(found, metric), "Every run while it trained."),
    }  # fmt: skip
    parts = []
    for name, (figure, caption) in drawn.items():
        if figure is None:
            continue
        png = figures.png(figure)
        (workdir / f"{name}.png").write_bytes(png)
        data = base64.b64encode(png).decode()
        wide = ' class="wide"' if name.endswith("curves") else ""
        parts.append(
            f'<figure{wide}><img alt="{name.replace("_", " ")}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<div class="pictures">{"".join(parts)}</div>'


def _budgets(measured: Sequence[Mean], metric: str) -> str:
    rows = []
    for budget, mean in results.under_budgets(measured, metric):
        run = mean.runs[0]
        layers = ", ".join(map(str, run.full_layers)) or "none"
        cells = [run.mixer, run.point.get("ratio", ""), layers, _value(mean)]
        rows.append(
            f"<tr><td>{quantity(budget, 'B')}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        )
    head = "<th>from</th><th>mixer</th><th>ratio</th><th>full layers</th><th>" + metric + "</th>"
    return (
        "<h2>Best under a budget of bytes</h2>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
        '<p class="note">State and KV cache of one sequence. A row holds up to the budget of the next.</p>'
    )


def _runs(found: Sequence[Result]) -> str:
    rows = []
    for r in found:
        layers = "all" if r.fraction == 1 else ", ".join(map(str, r.full_layers)) or "none"
        shown = [f"{value:.4f}" if value is not None else "" for value in (r.recall, r.loss)]
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second else ""
        state = r.state if r.state != "failed" else f"failed: {r.error}"
        numbers = [f"{r.parameters:,}", quantity(r.bytes, "B"), *shown, speed]
        bad = ' class="text bad"' if r.state == "failed" else ' class="text"'
        rows.append(
            f'<tr><td>{html.escape(r.name)}</td><td class="text">{layers}</td>'
            f"{''.join(f'<td>{n}</td>' for n in numbers)}<td{bad}>{html.escape(state)}</td></tr>"
        )
    head = (
        '<th>run</th><th class="text">full layers</th><th>parameters</th><th>state + KV</th><th>recall</th>'
        '<th>loss</th><th>tokens/s</th><th class="text"></th>'
    )
    return f'<h2>Runs</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _notes(found: Sequence[Result]) -> str:
    missing = [r for r in found if r.state != "finished"]
    note = (
        "Every run finished."
        if not missing
        else f"{len(missing)} of {len(found)} runs did not finish and are in no figure: {', '.join(r.name for r in missing)}."
    )
    return f'<p class="note">{html.escape(note)} Full layers are counted from 0. The same numbers are in results.csv.</p>'


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    try:
        print(f"written: {write(parser.parse_args(argv).workdir)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
