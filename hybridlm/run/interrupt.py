"""Requests to stop early: signals, and the run's wall-clock limit.

SIGTERM, SIGINT and SIGUSR1 ask; the trainer saves at the next step boundary and leaves. A second SIGTERM or
SIGINT ends the process at once. SLURM warns ahead of a time limit with SIGUSR1: `sbatch --signal=USR1@300`.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger("hybridlm")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDS_AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # when it is not the first; SIGUSR1 is only ever a warning
TIME_LIMIT = 1 << 16  # above every signal's number


class Stop:
    """Context manager that listens while it is open.

    Signals arrive through a pipe that a thread reads, because Python runs its own handlers only between
    bytecodes: a compilation of minutes would keep even a second signal waiting.
    max_minutes: of wall-clock time from now on; 0 sets no limit.
    """

    def __init__(self, max_minutes: float = 0.0):
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.signal = 0

    def __enter__(self) -> "Stop":
        self.handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            log.info("not in the main thread: signals do not save a checkpoint")
            return self
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.handlers:
            signal.set_wakeup_fd(self.wakeup)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            os.close(self.write_end)  # ends the thread

    def _listen(self) -> None:
        while byte := os.read(self.read_end, 1):
            number = byte[0]
            if self.signal and number in ENDS_AT_ONCE:
                os._exit(128 + number)
            if number in SIGNALS and not self.signal:
                self.signal = number
                name = signal.Signals(number).name
                log.warning("%s: saving at the next step, then leaving; once more ends at once", name)
        os.close(self.read_end)

    def asked(self) -> int:
        """0, or why this process wants to stop: the number of a signal, or TIME_LIMIT."""
        return self.signal or (TIME_LIMIT if time.monotonic() > self.deadline else 0)


def reason(asked: int) -> str:
    """What a non-zero `Stop.asked` means, in words."""
    return "the time limit train.max_minutes" if asked == TIME_LIMIT else signal.Signals(asked).name


def vote(mesh: Mesh) -> Callable[[int], int]:
    """A function that every process calls once a step with its wish; all get the largest, at the same step.

    It never waits for more than the step before: what it returns are the wishes of the call before (alone:
    of this call). The exchange is a computation on the mesh, queued behind the step.
    """
    if jax.process_count() == 1:
        return lambda wish: wish
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending: list[jax.Array] = []

    def exchange(wish: int) -> int:
        mine = lambda index: np.full(mesh.size, wish, np.int32)[index]
        pending.append(largest(jax.make_array_from_callback((mesh.size,), spread, mine)))
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return exchange
