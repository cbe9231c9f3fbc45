"""Where the time of training steps goes."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hybridlm import cost
from hybridlm.config import Config


class Running:
    """A step that was handed to the devices. A thread waits for its end: the loop itself may be late, since
    handing over the next step blocks where a program asks the host how to go on."""

    def __init__(self, metrics: Any, asked: float, came: float, before: "Running | None" = None):
        self.metrics, self.before = metrics, before
        self.asked, self.came = asked, came  # of its batch: when it was asked for, and there
        self.end = 0.0
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        with contextlib.suppress(Exception):  # raised again to whoever reads them
            jax.block_until_ready(self.metrics)
            if self.before:  # else the two threads may read the time in the other order
                self.before.thread.join()
            self.end = time.perf_counter()
        self.before = None

    def ended(self) -> float:
        """When it ended, or by now if it failed, which reading its metrics tells."""
        self.thread.join()
        return self.end or time.perf_counter()


class Clock:
    """Where the time of the steps since the last `rates` went.

    tokens_per_second counts every position of every row. data_seconds is what the devices waited for batches,
    which are read ahead; the rest of a step is compute_seconds. Validation, samples and saves are left out.
    runs: that share the step; tokens are those of all, and their number stands beside the rates.
    again: FLOPs of a step that it computes a second time (`hybridlm.recomputation`), which hfu counts, too.
    """

    def __init__(self, config: Config, devices: int, runs: int = 1, again: float = 0):
        self.tokens = runs * config.train.batch_size * config.train.seq_len
        self.packed = {"packed": runs} if runs > 1 else {}
        peak = cost.peak_flops(jax.devices()[0].device_kind)
        flops = cost.train_flops_per_token(config)
        counted = {"mfu": flops, "hfu": flops + again / self.tokens}
        self.of_rate = {name: n / (peak * devices) for name, n in counted.items()} if peak else {}
        self.steps, self.total, self.waited = 0, 0.0, 0.0
        self.last: Running | None = None
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last step's end."""
        self.mark = time.perf_counter()

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        asked = time.perf_counter()
        batch = next(batches)
        self.batch = asked, time.perf_counter()
        return batch

    def watch(self, metrics: Any) -> Running:
        """The step of the batch that `next` gave last, which has metrics (arrays) when it is complete."""
        self.last = Running(metrics, *self.batch, self.last)
        return self.last

    def tick(self, step: Running) -> None:
        """One more step is complete."""
        end = step.ended()
        self.waited += max(0.0, step.came - max(step.asked, self.mark))
        self.steps, self.total, self.mark = self.steps + 1, self.total + end - self.mark, end

    def rates(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        seconds, waited = self.total / self.steps, self.waited / self.steps
        self.steps, self.total, self.waited = 0, 0.0, 0.0
        rate = self.tokens / seconds
        of_peak = {name: rate * share for name, share in self.of_rate.items()}
        times = {"step_seconds": seconds, "data_seconds": waited, "compute_seconds": seconds - waited}
        return {"tokens_per_second": rate, **times, **of_peak, **self.packed}
