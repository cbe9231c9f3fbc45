"""loss.png."""

from hybridlm.run import picture


def test_the_smoothed_curve_is_a_running_mean():
    assert picture.smoothed([]) == [] and picture.smoothed([3.0, 1.0]) == [3.0, 1.0]  # too few to smooth
    values = [float(i % 2) for i in range(400)]
    got = picture.smoothed(values)
    mean = 0.0
    for value, smooth in zip(values, got, strict=True):  # with weights 1/20
        mean = 0.95 * mean + 0.05 * value
        assert abs(mean - smooth) < 1e-12
    assert abs(got[-1] - 0.5) < 0.03


def test_the_picture_has_title_curves_and_references(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (seen.append(self), save(self, path)))
    records = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0, "val_loss": 1.5}]
    picture.plot(records, tmp_path / "loss.png", "x: kda $1", {"gzip -9": 2.2, "order-0 entropy": 3.3})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    [axes] = seen[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training batch", "training, smoothed", "held out", "gzip -9, held out", "order-0 entropy, held out",
    ]  # fmt: skip
    assert list(axes.lines[0].get_xdata()) == [1, 3] and list(axes.lines[3].get_ydata()) == [2.2, 2.2]
    assert "kda" in axes.get_title()
