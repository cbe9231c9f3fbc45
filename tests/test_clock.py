"""Rates of steps whose ends are known: metrics are there when a test says so, by a clock that it sets."""

import threading
from types import SimpleNamespace

import pytest

from configs import quickstart
from hybridlm.config import resolve
from hybridlm.run import clock as clocks
from hybridlm.run.clock import Clock

CONFIG = resolve(quickstart.get_config())


class Metric:
    """Stands for an array: complete once `there` is set."""

    def __init__(self, error=None):
        self.there, self.error = threading.Event(), error

    def block_until_ready(self):
        self.there.wait()
        if self.error:
            raise self.error
        return self


@pytest.fixture
def time(monkeypatch):
    """What the clock reads: seconds that only the test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def batches(time, *seconds):
    for wait in seconds:
        time.seconds += wait
        yield {}


def end(metric, running):
    metric.there.set()
    running.thread.join()


def test_a_loop_that_looks_late_does_not_move_the_steps_ends(time):
    clock, source = Clock(CONFIG, devices=1), batches(time, 0, 0)
    clock.next(source)
    first = Metric()
    running = clock.watch({"loss": first})
    time.seconds += 1
    end(first, running)
    time.seconds += 2  # what handing over the next step took
    clock.tick(running)
    assert clock.rates()["step_seconds"] == 1
    clock.next(source)
    second = Metric()
    running = clock.watch({"loss": second})
    time.seconds += 4
    end(second, running)
    clock.tick(running)
    assert clock.rates()["step_seconds"] == 6  # the devices did wait for it


def test_waiting_for_a_batch_counts_where_nothing_is_left_to_compute(time):
    clock, source = Clock(CONFIG, devices=1), batches(time, 1, 2, 4)
    clock.next(source)
    first, second = Metric(), Metric()
    running = clock.watch(first)
    clock.next(source)  # while the first step computes
    following = clock.watch(second)
    end(first, running)
    clock.tick(running)
    rates = clock.rates()
    assert (rates["data_seconds"], rates["compute_seconds"]) == (1, 2)
    clock.next(source)
    end(second, following)
    clock.tick(following)
    rates = clock.rates()
    assert (rates["data_seconds"], rates["compute_seconds"], rates["step_seconds"]) == (0, 4, 4)


def test_a_step_does_not_end_before_the_one_before_it(time):
    """Whichever thread sees its metrics first."""
    clock, source = Clock(CONFIG, devices=1), batches(time, 0, 0)
    clock.next(source)
    first, second = Metric(), Metric()
    running = clock.watch(first)
    clock.next(source)
    following = clock.watch(second)
    second.there.set()
    time.seconds += 1
    following.thread.join(0.1)
    assert following.thread.is_alive()
    first.there.set()
    assert running.ended() <= following.ended()
    assert clock.last.before is None  # no chain of steps stays


def test_a_step_that_fails_ends_when_it_is_read(time):
    clock = Clock(CONFIG, devices=1)
    clock.next(batches(time, 0))
    metric = Metric(RuntimeError("out of memory"))
    running = clock.watch(metric)
    end(metric, running)
    time.seconds += 3
    clock.tick(running)
    assert clock.rates()["step_seconds"] == 3
