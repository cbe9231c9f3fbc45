"""What is kept of layers with given scores, and its picture; with models: test_distil, test_linearise."""

import math

from matplotlib import figure

from hybridlm import layer_choice


def test_a_layer_that_breaks_the_model_stays():
    assert layer_choice.ranked({0: 3.0, 1: math.nan, 2: 4.0, 3: math.inf})[2:] == [2, 0]


def test_picture_of_a_layer_choice(tmp_path, monkeypatch):
    """Its bars are the costs, those to keep in colour; a layer that breaks the model has none."""
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self))
    layer_choice.draw({0: 1.5, 1: math.inf, 4: 2.25}, [1, 4], 1.25, tmp_path / "x.png")
    [axes] = drawn[0].axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in axes.patches}
    assert {layer: bar.get_height() for layer, bar in bars.items()} == {0: 0.25, 4: 1.0}
    assert bars[0].get_facecolor() != bars[4].get_facecolor()
    assert [line.get_xdata()[0] for line in axes.lines] == [1]
