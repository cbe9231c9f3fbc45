"""loss.png: the loss of a run, training and held-out, beside what needs no model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridlm import untrusted

NONE: Mapping[str, float] = {}
VAL_SET = re.compile("val/.+/loss")  # of config.val
SMOOTH = 0.05  # part of the curve's points that an average reaches over


def plot(records: Sequence[Any], path: Path, title: str = "", references: Mapping[str, float] = NONE) -> None:
    """Nats per token over steps, as a PNG. references: name -> level of a horizontal line."""
    from matplotlib.figure import Figure  # slow to import, used once; a bare Figure draws with Agg

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.add_subplot()
    train = [r for r in records if "loss" in r]  # not in the line of a skipped update
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axes.plot(steps, losses, color="C0", linewidth=0.6, alpha=0.35, label="training batch")
    axes.plot(steps, smoothed(losses), color="C0", linewidth=1.5, label="training, smoothed")
    held_out = [r for r in records if "val_loss" in r]
    if held_out:
        values = [r["val_loss"] for r in held_out]
        axes.plot([r["step"] for r in held_out], values, "o-", color="C1", markersize=3, label="held out")
    names = dict.fromkeys(key for r in records for key in r if VAL_SET.fullmatch(key))
    for number, name in enumerate(names, 2):
        points = [(r["step"], r[name]) for r in records if name in r]
        label = untrusted.plot(name.removesuffix("/loss"))
        axes.plot(*zip(*points, strict=True), ".-", color=f"C{number}", linewidth=1, label=label)
    for number, (name, level) in enumerate(references.items()):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(level, color="0.4", linewidth=1, linestyle=style, label=f"{name}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if title:
        axes.set_title(untrusted.plot(title), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean, exponentially weighted over SMOOTH of them, that begins with the first."""
    rate = 1 / max(1.0, SMOOTH * len(values))
    found: list[float] = []
    for value in values:
        found.append(value if not found else found[-1] + rate * (value - found[-1]))
    return found
