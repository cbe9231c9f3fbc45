"""The report's pictures. Each function draws one, or returns None where the runs have nothing for it."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from hybridlm import untrusted
from hybridlm.report import quantity
from launch import results
from launch.results import Mean, Result

# Okabe and Ito's colours, told apart by most people who see colours differently; and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
FULL = {"color": "black", "marker": "*"}
NAMES = {"recall": "recall (held-out accuracy)", "loss": "held-out loss (nats per token)"}
SIZE, PANEL = (5.4, 4.2), (4.2, 3.1)  # inches; at the width of a phone 10 points are 10 pixels
LONGEST = 32  # characters of a label
COLUMNS = 3  # of a legend
GUESS: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1.4}


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def text(label: str) -> str:
    """``label`` as it is drawn: short, one line, and nothing that matplotlib reads as more than text."""
    label = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
    label = untrusted.plot(label)
    return f" {label}" if label.startswith("_") else label  # a leading _ hides a label from a legend


def styles(found: Sequence[Mean]) -> dict[str, dict[str, Any]]:
    labels = sorted({mean.label for mean in found if mean.fraction < 1})
    return {m: {"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8]} for i, m in enumerate(labels)}


def over_fraction(found: Sequence[Mean], metric: str) -> Figure | None:
    """The metric against the share of full layers, a line for each mixer, bands over seeds."""
    series, look = results.by_mixer(found), styles(found)
    if len({mean.fraction for line in series.values() for mean in line}) < 2:
        return None
    figure, axes = _figure()
    for label, line in series.items():
        x, style = [m.fraction for m in line], look.get(label, FULL)
        axes.plot(x, [m.value for m in line], label=text(label), markersize=5, linewidth=1.5, **style)
        axes.fill_between(x, *_ends(line), color=style["color"], alpha=0.24 / (1 + len(series)), linewidth=0)
    axes.set_xlabel("share of full-attention layers")
    _finish(axes, found, metric)
    return figure


def placements(found: Sequence[Mean], metric: str) -> Figure | None:
    """The metric by where the full layers stand, for the ratios that were run at several places."""
    chosen = [mean for mean in found if results.placed(mean)]
    if not chosen:
        return None
    keys = {(m.label, len(m.runs[0].full_layers)) for m in chosen}
    chosen = [m for m in found if (m.label, len(m.runs[0].full_layers)) in keys and m.fraction < 1]
    where = sorted({tuple(m.runs[0].full_layers) for m in chosen})
    look, labels = styles(found), sorted({m.label for m in chosen})
    figure, axes = _figure()
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        own = [m for m in chosen if m.label == label]
        x = [where.index(tuple(m.runs[0].full_layers)) + (i - (len(labels) - 1) / 2) * width for m in own]
        value = np.array([m.value for m in own])
        low, high = map(np.array, _ends(own))
        ends = [value - low, high - value]
        style = {"fmt": look[label]["marker"], "color": look[label]["color"], "label": text(label)}
        axes.errorbar(x, value, ends, markersize=6, capsize=2, linewidth=1, **style)
    shown = [text(", ".join(map(str, w))) for w in where]
    crowded = sum(map(len, shown)) > 45
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {}
    axes.set_xticks(range(len(where)), shown, **turned)
    axes.set_xlim(-0.6, len(where) - 0.4)
    axes.set_xlabel(f"indices of the full layers, of {chosen[0].runs[0].num_layers} (0 is at the input)")
    _finish(axes, chosen, metric)
    return figure


def pareto(found: Sequence[Mean], metric: str, against: str) -> Figure | None:
    """The metric against "bytes" or "tokens_per_second"; what no other beats in both is ringed and joined."""
    cost = {m.runs[0].name: _cost(m, against) for m in found}
    known = [m for m in found if cost[m.runs[0].name]]
    if len(known) < 2:
        return None
    figure, axes = _figure()
    place = lambda chosen: ([cost[m.runs[0].name] for m in chosen], [m.value for m in chosen])
    look = styles(found) | {m.label: FULL for m in known if m.fraction == 1}
    for label, style in look.items():
        own = [m for m in known if m.label == label]
        if own:
            axes.scatter(*place(own), s=34, label=text(label), c=style["color"], marker=style["marker"])
    sign = 1 if metric in results.HIGHER else -1
    edge = results.front(known, cost, -1 if against == "bytes" else 1, sign)
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgewidth": 0.8,
    }
    axes.plot(*place(edge), color="0.4", linewidth=1, linestyle="--", zorder=0, label="front", **ring)
    log_axis(axes, [cost[m.runs[0].name] for m in known])
    axes.set_xlabel(
        "state + KV cache of one sequence (bytes)" if against == "bytes" else "training tokens/s of one run"
    )
    _finish(axes, known, metric)
    return figure


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis over ``values`` with labels, between three and eight of them, at round numbers."""
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**power for power in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    else:  # less than about a factor of two
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value, ""))


def curves(runs: Sequence[Result], metric: str) -> Figure | None:
    """The metric while training: a panel for each mixer, a colour for each share of full layers.

    Seeds, rates and placements of one share are thin lines of one colour, their mean a thick one.
    """
    drawn = [run for run in runs if len(run.curves[metric]) > 1]
    labels = sorted({run.label for run in drawn})
    if not drawn:
        return None
    columns = min(2, len(labels))
    rows = -(-len(labels) // columns)
    size = SIZE if columns == 1 else (PANEL[0] * columns, PANEL[1] * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shares = {run.fraction: f"{len(run.full_layers)} of {run.num_layers}" for run in drawn}
    seen = sorted(shares)
    colours = matplotlib.colormaps["viridis_r"]
    shade = {share: colours(0.08 + 0.92 * i / max(1, len(seen) - 1)) for i, share in enumerate(seen)}
    for label, axes in zip(labels, panels.flat, strict=False):
        for share in seen:
            own = [run for run in drawn if run.label == label and run.fraction == share]
            colour = shade[share]
            for run in own if len(own) > 1 else ():
                axes.plot(*zip(*run.curves[metric], strict=True), color=colour, linewidth=0.6, alpha=0.35)
            if own:  # one that failed early would end the mean of all
                whole = [run for run in own if run.state == "finished"] or own
                axes.plot(*_mean_curve([r.curves[metric] for r in whole]), color=colour, linewidth=1.8)
        axes.set_title(text(label), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value, ""))
        axes.grid(alpha=0.25)
    for axes in panels.flat[len(labels) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(labels) - columns) : len(labels)]:  # the last of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("training tokens")
    lines = [panels.flat[0].plot([], [], color=shade[share], label=shares[share])[0] for share in seen]
    highest = max(v for run in drawn for _, v in run.curves[metric])
    lines += [_levels(axes, drawn, metric, highest) for axes in panels.flat[: len(labels)]][-1]
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": 3 * columns, "frameon": False}
    figure.legend(handles=lines, title="full layers", fontsize=9, title_fontsize=9, **where)
    figure.supylabel(NAMES[metric], fontsize=10)
    return figure


def _mean_curve(found: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Over the points that all of the curves have."""
    by_tokens: dict[float, list[float]] = {}
    for curve in found:
        for tokens, value in dict(curve).items():
            by_tokens.setdefault(tokens, []).append(value)
    common = sorted(tokens for tokens, values in by_tokens.items() if len(values) == len(found))
    return common, [sum(by_tokens[tokens]) / len(found) for tokens in common]


def _cost(mean: Mean, against: str) -> float:
    values = [getattr(run, against) for run in mean.runs]
    return 0.0 if None in values else sum(values) / len(values)


def _ends(line: Sequence[Mean]) -> tuple[list[float], list[float]]:
    """Low and high ends of the intervals; where one seed has none both are the value."""
    ends = [(m.value, m.value) if math.isnan(m.low) else (m.low, m.high) for m in line]
    return [low for low, _ in ends], [high for _, high in ends]


def _levels(axes: Axes, runs: Sequence[Result], metric: str, highest: float) -> list[Any]:
    """The ends of the y axis, and a line of guessing where it is the same for all ``runs``: [it], or [].

    Nor is there one where it would leave the rest unreadable: the loss of guessing may be far above all.
    """
    if metric == "recall":
        axes.set_ylim(-0.02, 1.04)
    level, *others = {run.guess[metric] for run in runs}
    if others or level is None or (metric == "loss" and level > 1.3 * highest):
        return []
    return [axes.axhline(level, label="guessing", **GUESS)]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _finish(axes: Axes, found: Sequence[Mean], metric: str) -> None:
    """The y axis, the level of guessing, and below all the legend, where it covers nothing."""
    axes.set_ylabel(NAMES[metric])
    _levels(axes, [run for mean in found for run in mean.runs], metric, max(mean.value for mean in found))
    figure = axes.get_figure()
    assert figure is not None
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": COLUMNS, "fontsize": 9, "frameon": False}
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in ("front", "guessing"))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], **where)
