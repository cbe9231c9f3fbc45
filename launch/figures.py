"""The report's pictures. Each function draws one, or returns None where the runs have nothing for it."""

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlm.report import quantity
from launch import results
from launch.results import Mean, Result

# Okabe and Ito's colours, told apart by most people who see colours differently; and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
NAMES = {"recall": "recall (held-out accuracy)", "loss": "held-out loss (nats per token)"}
SIZE = (5.2, 3.9)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def styles(found: Sequence[Mean]) -> dict[str, dict[str, Any]]:
    mixers = sorted({mean.runs[0].mixer for mean in found if mean.fraction < 1})
    return {m: {"color": COLOURS[i % 8], "marker": MARKERS[i % 8]} for i, m in enumerate(mixers)}


def over_fraction(found: Sequence[Mean], metric: str) -> Figure | None:
    """The metric against the share of full layers, a line for each mixer, bands over seeds."""
    series, look = results.by_mixer(found), styles(found)
    if len({mean.fraction for line in series.values() for mean in line}) < 2:
        return None
    figure, axes = _figure()
    for mixer, line in series.items():
        x, y = [m.fraction for m in line], [m.value for m in line]
        axes.plot(
            x,
            y,
            label=mixer,
            markersize=4,
            linewidth=1.3,
            **look.get(mixer, {"color": "black", "marker": "o"}),
        )
        low, high = ([m.value + s * (0 if math.isnan(m.half) else m.half) for m in line] for s in (-1, 1))
        axes.fill_between(
            x, low, high, color=look.get(mixer, {"color": "black"})["color"], alpha=0.12, linewidth=0
        )
    axes.set_xlabel("share of full-attention layers")
    axes.set_ylabel(NAMES[metric])
    if metric == "recall":
        axes.set_ylim(-0.02, 1.04)
    _legend(axes)
    return figure


def placements(found: Sequence[Mean], metric: str) -> Figure | None:
    """The metric by where the full layers stand, for the ratios that were run at several places."""
    chosen = [mean for mean in found if results.placed(mean)]
    if not chosen:
        return None
    keys = {(m.runs[0].mixer, len(m.runs[0].full_layers)) for m in chosen}
    chosen = [m for m in found if (m.runs[0].mixer, len(m.runs[0].full_layers)) in keys and m.fraction < 1]
    where = sorted({tuple(m.runs[0].full_layers) for m in chosen})
    look, mixers = styles(found), sorted({m.runs[0].mixer for m in chosen})
    figure, axes = _figure()
    width = 0.8 / len(mixers)
    for i, mixer in enumerate(mixers):
        own = [m for m in chosen if m.runs[0].mixer == mixer]
        x = [where.index(tuple(m.runs[0].full_layers)) + (i - (len(mixers) - 1) / 2) * width for m in own]
        half = [0 if math.isnan(m.half) else m.half for m in own]
        axes.errorbar(
            x,
            [m.value for m in own],
            half,
            fmt=look[mixer]["marker"],
            color=look[mixer]["color"],
            label=mixer,
            markersize=5,
            capsize=2,
            linewidth=1,
        )
    axes.set_xticks(range(len(where)), [", ".join(map(str, w)) for w in where])
    axes.set_xlabel(f"indices of the full layers, of {chosen[0].runs[0].num_layers} (0 is at the input)")
    axes.set_ylabel(NAMES[metric])
    if metric == "recall":
        axes.set_ylim(-0.02, 1.04)
    _legend(axes)
    return figure


def pareto(found: Sequence[Mean], metric: str, against: str) -> Figure | None:
    """The metric against "bytes" or "tokens_per_second"; the front is a line."""
    cost = {m.runs[0].name: _cost(m, against) for m in found}
    known = [m for m in found if cost[m.runs[0].name]]
    if len(known) < 2:
        return None
    figure, axes = _figure()
    look = styles(found) | {
        m.runs[0].mixer: {"color": "black", "marker": "*"} for m in known if m.fraction == 1
    }
    for mixer, style in look.items():
        own = [m for m in known if m.runs[0].mixer == mixer]
        if own:
            axes.scatter(
                [cost[m.runs[0].name] for m in own],
                [m.value for m in own],
                s=26,
                label=mixer,
                c=style["color"],
                marker=style["marker"],
            )
    sign = 1 if metric in results.HIGHER else -1
    edge = results.front(known, cost, -1 if against == "bytes" else 1, sign)
    axes.plot(
        [cost[m.runs[0].name] for m in edge],
        [m.value for m in edge],
        color="0.4",
        linewidth=1,
        linestyle="--",
        zorder=0,
        label="front",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value, ""))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel(
        "state + KV cache of one sequence (bytes)"
        if against == "bytes"
        else "training tokens/s, as measured in the sweep"
    )
    axes.set_ylabel(NAMES[metric])
    _legend(axes)
    return figure


def _cost(mean: Mean, against: str) -> float:
    values = [getattr(run, against) for run in mean.runs]
    return 0.0 if None in values else sum(values) / len(values)


def curves(runs: Sequence[Result], metric: str) -> Figure | None:
    """The metric while training, a panel for each mixer, a colour for each share of full layers."""
    drawn = [run for run in runs if len(run.curves[metric]) > 1]
    mixers = sorted({run.mixer for run in drawn})
    if not drawn:
        return None
    columns = min(2, len(mixers))
    rows = -(-len(mixers) // columns)
    figure = Figure(figsize=(SIZE[0] if columns == 1 else 6.4, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(mixers) :]:
        panel.set_visible(False)
    seen = sorted({run.fraction for run in drawn})
    for mixer, axes in zip(mixers, panels.flat, strict=False):
        for run in (r for r in drawn if r.mixer == mixer):
            colour = _shade(seen.index(run.fraction) / max(1, len(seen) - 1))
            label = f"{len(run.full_layers)} of {run.num_layers}"
            x, y = zip(*run.curves[metric], strict=True)
            axes.plot(x, y, color=colour, linewidth=1, label=label)
        axes.set_title(mixer, fontsize=9)
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value, ""))
        axes.grid(alpha=0.25)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        order = sorted(handles, key=lambda text: int(text.split()[0]))
        axes.legend(
            [handles[text] for text in order], order, fontsize=7, title="full layers", title_fontsize=7
        )
    figure.supxlabel("training tokens", fontsize=9)
    figure.supylabel(NAMES[metric], fontsize=9)
    return figure


def _shade(share: float) -> tuple[float, float, float]:
    """From orange, no full layer, to dark blue, all."""
    ends = ((0.90, 0.55, 0.0), (0.0, 0.25, 0.55))
    return tuple(a + share * (b - a) for a, b in zip(*ends, strict=True))  # type: ignore[return-value]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, framealpha=0.85)
