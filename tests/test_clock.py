"""Rates of steps whose ends are known: metrics that are there when a test says so."""

import threading
import time

import pytest

from configs import quickstart
from hybridlm.config import resolve
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


def batches(*seconds):
    for wait in seconds:
        time.sleep(wait)
        yield {}


def test_a_loop_that_looks_late_does_not_move_the_steps_ends():
    clock, source = Clock(CONFIG, devices=1), batches(0, 0)
    clock.next(source)
    first = Metric()
    running = clock.watch({"loss": first})
    first.there.set()
    running.thread.join()
    time.sleep(0.3)  # what handing over the next step took
    clock.tick(running)
    assert clock.rates()["step_seconds"] < 0.15
    clock.next(source)
    second = Metric()
    running = clock.watch({"loss": second})
    second.there.set()
    clock.tick(running)
    assert clock.rates()["step_seconds"] >= 0.3  # the devices did wait for it


def test_waiting_for_a_batch_counts_where_nothing_is_left_to_compute():
    clock, source = Clock(CONFIG, devices=1), batches(0.2, 0.2, 0.2)
    clock.next(source)
    first, second = Metric(), Metric()
    running = clock.watch(first)
    clock.next(source)  # while the first step computes
    following = clock.watch(second)
    first.there.set()
    clock.tick(running)
    rates = clock.rates()
    assert 0.2 <= rates["data_seconds"] < 0.3  # the first batch; the second came meanwhile
    assert rates["compute_seconds"] >= 0.2
    clock.next(source)
    second.there.set()
    clock.tick(following)
    rates = clock.rates()
    assert rates["data_seconds"] == 0
    assert rates["compute_seconds"] == pytest.approx(rates["step_seconds"])


def test_a_step_that_fails_ends_when_it_is_read():
    clock = Clock(CONFIG, devices=1)
    clock.next(batches(0))
    metric = Metric(RuntimeError("out of memory"))
    running = clock.watch(metric)
    metric.there.set()
    clock.tick(running)
    assert 0 < clock.rates()["step_seconds"] < 1
