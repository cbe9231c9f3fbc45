"""The report's pictures: axes that can be read, and a legend for every line."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch import figures, results
from tests.sweep_files import write


@pytest.mark.parametrize("values", [
    (1, 2), (900, 1100), (40, 41), (3e6, 3.1e6, 9e6), (1e3, 1e9), (5, 5), (1, 1e15)])  # fmt: skip
def test_a_log_axis_has_labels(values: tuple[float, ...]):
    axes = Figure().add_subplot()
    figures.log_axis(axes, values)
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels) and all(labels)
    assert axes.get_xlim()[0] < min(values) and max(values) < axes.get_xlim()[1]


def test_every_line_is_in_a_legend(tmp_path: Path):
    write(tmp_path)
    _, found = results.read(tmp_path)
    measured = results.means(found, "recall")
    legend = lambda figure: {label.get_text() for label in figure.legends[0].get_texts()}
    assert legend(figures.over_fraction(measured, "recall")) == {"gla", "kda", "guessing"}
    assert legend(figures.pareto(measured, "recall", "bytes")) == {"gla", "kda", "full", "front", "guessing"}
    assert legend(figures.curves(found, "recall")) == {
        f"{n} of 4" for n in (0, 1, 2, 4)} | {"guessing"}  # fmt: skip
    single = figures.pareto(measured[:2], "recall", "bytes")
    assert single is not None
    (front,) = [line for line in single.axes[0].lines if line.get_label() == "front"]
    assert front.get_marker() == "o"  # seen even where the front is one point
