"""Results as a table in the terminal and as a picture."""

from pathlib import Path

from rich import box
from rich.table import Table

from eval.runner import Result, put_figure
from hybridlm import untrusted
from hybridlm.report import quantity


def table(results: dict[str, Result], title: str) -> Table:
    """A row for each task and length: accuracy, its 95% interval, samples, what guessing gets, bytes of
    states, keys and values of a context. In a terminal of 80 columns.
    """
    shown = Table(
        title=untrusted.markup(title), title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True,
        pad_edge=False,
    )  # fmt: skip
    shown.add_column("task", no_wrap=True)
    for column in ("length", "accuracy", "95% interval", "samples", "guess", "kept"):
        shown.add_column(column, justify="right", no_wrap=True)
    for result in results.values():
        chance = result["chance"]
        shown.add_row(
            untrusted.markup(result["task"]),
            f"{result['length']:,}",
            f"{result['accuracy']:.3f}",
            f"{result['low']:.3f} to {result['high']:.3f}",
            f"{result['samples']:,}",
            "" if chance is None else "0" if chance < 5e-4 else f"{chance:.3f}",
            quantity(result["kept_bytes"], "B") if "kept_bytes" in result else "",
        )
    return shown


def turns(results: dict[str, Result]) -> list[str]:
    """A line for each session's accuracy by turn."""
    each = {name: result["by_turn"] for name, result in results.items() if "by_turn" in result}
    return [f"{name} by turn: {' '.join(f'{value:.2f}' for value in found)}" for name, found in each.items()]


def plot(results: dict[str, Result], title: str, path: Path) -> None:
    """Accuracy by length, a panel for each task, with 95% intervals and the level of guessing, as a PNG."""
    from matplotlib.figure import Figure  # slow to import; a bare Figure draws with Agg

    names = list(dict.fromkeys(result["task"] for result in results.values()))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.5 + 2.4 * rows), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)  # .flat is walked once only
    for axes in panels:
        axes.set_visible(False)
    for name, axes in zip(names, panels, strict=False):
        found = sorted((r for r in results.values() if r["task"] == name), key=lambda r: r["length"])
        lengths, means = [r["length"] for r in found], [r["accuracy"] for r in found]
        below = [max(0.0, r["accuracy"] - r["low"]) for r in found]
        above = [max(0.0, r["high"] - r["accuracy"]) for r in found]
        axes.set_visible(True)
        axes.errorbar(lengths, means, yerr=[below, above], fmt="o-", markersize=4, capsize=3)
        if found[0]["chance"] is not None:
            axes.axhline(found[0]["chance"], color="gray", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"{untrusted.plot(name)} (n={found[0]['samples']})", fontsize=8)
        axes.grid(alpha=0.3)
    legend = "x: tokens, y: accuracy, bars: 95%, dotted: guessing"
    figure.suptitle(f"{untrusted.plot(title)}\n{legend}", fontsize=8)
    put_figure(path, figure)
