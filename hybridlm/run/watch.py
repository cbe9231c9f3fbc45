"""What goes wrong with numbers: updates skipped because they are not finite, and jumps of loss and gradient.

Every step's metrics pass through `Watch.see`. Trouble goes to the log and to ``events.jsonl`` in the workdir,
one JSON object an event with the ids of the batch's samples, so that the data can be looked at.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import model as lm
from hybridlm import stack
from hybridlm.errors import first_line
from hybridlm.program import UPDATED
from hybridlm.run import logbook

log = logging.getLogger("hybridlm")

WINDOW, ENOUGH = 128, 32  # recent steps compared with, and how many it takes
LOSS_DEVIATIONS = 8.0  # from the median, in median absolute deviations scaled to a normal's sigma
GRADIENT_FACTOR = 8.0  # times the median
LARGEST = 5  # parameters named in an event

Metrics = dict[str, Any]


class Watch:
    """Counts and reports. All processes see the same metrics and so count alike; the first one reports.

    path: of events.jsonl, cut back to ``start``, the step resumed from.
    samples: step -> ids of its rows.
    skipped, in_a_row: updates skipped so far in all, and up to now; ``counts``: those of the run resumed.
    """

    def __init__(
        self,
        path: Path,
        definition: lm.Definition,
        samples: Callable[[int], list[str]],
        start: int,
        counts: tuple[int, int] = (0, 0),
    ):
        self.path, self.samples = path, samples
        self.skipped, self.in_a_row = counts
        self.definition = definition
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        if jax.process_index() == 0:
            logbook.truncate(path, start)

    def see(self, step: int, metrics: Mapping[str, float], squared_norms: Mapping[str, jax.Array]) -> Metrics:
        """``metrics`` of ``step`` without those that are not finite; with ``skipped``, the count so far."""
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm) and metrics.get(UPDATED, 1.0):
            self.in_a_row = 0
            if jump := self._jump(loss, norm):
                self._report(step, jump, metrics, squared_norms)
            self.losses.append(loss)
            self.norms.append(norm)
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._report(step, "skipped", metrics, squared_norms)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value) and name != UPDATED}
        return finite | {"skipped": self.skipped}

    def _jump(self, loss: float, norm: float) -> str | None:
        if len(self.losses) < ENOUGH:
            return None
        middle = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in self.losses)
        if loss > middle + LOSS_DEVIATIONS * spread:
            return "loss spike"
        return "gradient spike" if norm > GRADIENT_FACTOR * statistics.median(self.norms) else None

    @logbook.harmless("an event")
    def _report(
        self, step: int, event: str, metrics: Mapping[str, float], squared_norms: Mapping[str, jax.Array]
    ) -> None:
        if jax.process_index():
            return
        squares = by_parameter(jax.device_get(dict(squared_norms)), self.definition)
        numbers = f"loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        if event == "skipped":
            finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            first = "update" if finite else first_not_finite(squares)
            said = f"update skipped ({numbers}); first gradient that is not finite, from the loss down: "
            said += first
            if finite:
                said = f"update skipped, which is not finite where its gradient is ({numbers})"
            said += f"; {self.in_a_row} in a row, {self.skipped} in all"
            details: dict[str, Any] = {"first": first, "in_a_row": self.in_a_row, "skipped": self.skipped}
        else:
            total = sum(squares.values())
            largest = sorted(squares, key=lambda name: squares[name], reverse=True)[:LARGEST]
            said = f"{event} ({numbers}); largest gradient: {largest[0]}"
            details = {"largest": {name: round(squares[name] / total, 4) for name in largest}}
        log.warning("step %d: %s; samples in %s", step, said, self.path.name)
        record = {"step": step, "event": event, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
        self._event(record | details | {"samples": self.samples(step - 1)})

    def trouble(self, step: int, what: str, error: Exception) -> None:
        """Reports that looking at ``step`` failed, which changes nothing for training."""
        said = f"{type(error).__name__}: {first_line(error)}".encode("utf-8", "backslashreplace").decode()
        log.error("step %d: %s failed, going on without it: %s", step, what, said)
        log.debug("%s", what, exc_info=error)
        self._event({"step": step, "event": f"{what} failed", "error": said})

    def note(self, step: int, event: str, **details: Any) -> None:
        """Reports what neither a step nor a look was to blame for."""
        log.warning("step %d: %s (%s)", step, event, ", ".join(f"{n}: {v}" for n, v in details.items()))
        self._event({"step": step, "event": event} | details)

    def _event(self, record: dict[str, Any]) -> None:
        """A line of events.jsonl; a disk that refuses it is said in the log."""
        if jax.process_index():
            return
        text = {name: str(v) for name, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record | text) + "\n")
        except OSError as error:
            log.error("%s: cannot be written: %s", self.path, error.strerror)


def by_parameter(squared_norms: Mapping[str, np.ndarray], definition: lm.Definition) -> dict[str, float]:
    """Canonical parameter name -> squared norm, from the loss down: head, last layer, ..., embedding."""
    apart = stack.unstack(definition.layout, squared_norms)

    def place(name: str) -> tuple[int, int]:
        top, layer, *_ = *name.split("."), "0"
        return ("head", "final_norm", "layers", top).index(top), -int(layer) if top == "layers" else 0

    return {name: float(apart[name]) for name in sorted(apart, key=place)}


def first_not_finite(squares: Mapping[str, float]) -> str:
    """The first parameter of `by_parameter` whose gradient is not finite, "none" if only the loss is not."""
    return next((name for name, value in squares.items() if not math.isfinite(value)), "none")
