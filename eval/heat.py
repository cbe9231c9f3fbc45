"""The pictures of a comparison: heat maps of task x length, and accuracy by turn."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.paired import Difference
from eval.runner import Result
from launch import figures

CELL, MARGIN = (0.78, 0.3), (2.5, 1.3)  # inches
SMALLEST = 4.6  # inches of width


def accuracies(
    results: Mapping[str, Result], rows: Sequence[str], columns: Sequence[int], title: str
) -> Figure:
    """Accuracy of one run: white is guessing no better than nothing, dark is all right."""
    cells = {(r["task"], r["length"]): (r["accuracy"], f"{r['accuracy']:.2f}") for r in results.values()}
    return _map(cells, rows, columns, title, "Blues", (0.0, 1.0), "accuracy")


def changes(
    found: Mapping[str, Difference], rows: Sequence[str], columns: Sequence[int], title: str
) -> Figure:
    """Differences from the baseline: those that can be told are bold and starred."""
    cells = {}
    for name, change in found.items():
        task, _, length = name.rpartition("@")
        cells[task, int(length)] = (change.mean, f"{change.mean:+.2f}{'*' if change.told else ''}")
    widest = max([0.1, *(abs(value) for value, _ in cells.values())])
    return _map(cells, rows, columns, title, "RdBu", (-widest, widest), "difference of accuracies")


def _map(
    cells: Mapping[tuple[str, int], tuple[float, str]], rows: Sequence[str], columns: Sequence[int],
    title: str, colours: str, limits: tuple[float, float], label: str,
) -> Figure:  # fmt: skip
    width = max(SMALLEST, MARGIN[0] + CELL[0] * len(columns))
    figure = Figure(figsize=(width, MARGIN[1] + CELL[1] * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[cells.get((row, column), (float("nan"), ""))[0] for column in columns] for row in rows]
    image = axes.imshow(
        grid,
        aspect="auto",
        cmap=matplotlib.colormaps[colours].with_extremes(bad="0.93"),
        vmin=limits[0],
        vmax=limits[1],
    )
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            value, shown = cells.get((row, column), (0.0, "–"))
            dark = abs((value - limits[0]) / (limits[1] - limits[0]) - (0.5 if limits[0] < 0 else 0)) > (
                0.32 if limits[0] < 0 else 0.6
            )
            weight = "bold" if shown.endswith("*") else "normal"
            ink = "0.5" if shown == "–" else "white" if dark else "black"
            axes.text(x, y, shown, ha="center", va="center", fontsize=9, color=ink, weight=weight)
    axes.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), [figures.text(row) for row in rows], fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("tokens of context")
    axes.set_title(figures.text(title), fontsize=11)
    for side in axes.spines.values():
        side.set_visible(False)
    label = label if len(rows) > 2 else label.replace(" ", "\n")  # beside so short a bar
    figure.colorbar(image, label=label, shrink=min(1.0, 6 / len(rows)), aspect=12)
    return figure


def turns(runs: Mapping[str, Mapping[str, Result]], task: str, length: int) -> Figure:
    """Accuracy of one task by turn, a line for each run that has it."""
    figure = Figure(figsize=figures.SIZE, layout="constrained")
    axes = figure.add_subplot()
    name = f"{task}@{length}"
    for index, (run, results) in enumerate(runs.items()):
        if "by_turn" in results.get(name, {}):
            values = results[name]["by_turn"]
            colour, marker = figures.COLOURS[index % 8], figures.MARKERS[index % 8]
            x = range(1, len(values) + 1)
            axes.plot(x, values, label=figures.text(run), linewidth=1.5, color=colour, marker=marker)
    axes.set_ylim(-0.02, 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turn")
    axes.set_ylabel("accuracy")
    axes.set_title(f"{figures.text(task)}, {length:,} tokens", fontsize=11)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
