"""Fractions of the time in each phase of the training loop."""

import time
from typing import ClassVar

import pytest
import torch
from questpress.pipeline.training.metrics import MAX_UNREAD, Clock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_fractions_are_of_the_measured_time():
    now = Time()
    clock = Clock("cpu", now)
    for _ in range(3):
        with clock("data"):
            now.passes(1)
        now.passes(50)  # outside of any phase
        with clock("teacher"):
            now.passes(2)
        with clock("student"):
            now.passes(5)
    assert clock.fractions() == pytest.approx({"data": 1 / 8, "teacher": 2 / 8, "student": 5 / 8})


def test_inner_phase_interrupts_the_outer_one():
    now = Time()
    clock = Clock("cpu", now)
    with clock("student"):
        now.passes(1)
        with clock("teacher"):
            now.passes(2)
            with clock("data"):
                now.passes(4)
            now.passes(1)
        now.passes(2)
    assert clock.fractions() == pytest.approx({"data": 0.4, "teacher": 0.3, "student": 0.3})


def test_reset_clears_the_fractions():
    now = Time()
    clock = Clock("cpu", now)
    assert clock.fractions() == {}
    with clock("data"):
        now.passes(3)
    clock.reset()
    assert clock.fractions() == {}
    with clock("student"):
        now.passes(1)
    assert clock.fractions() == {"student": 1.0}


def test_failed_phase_ends():
    now = Time()
    clock = Clock("cpu", now)
    with pytest.raises(RuntimeError), clock("student"):
        now.passes(2)
        raise RuntimeError
    with clock("data"):
        now.passes(2)
    assert clock.fractions() == {"student": 0.5, "data": 0.5}


def test_iterate_measures_the_wait_for_each_item():
    now = Time()
    clock = Clock("cpu", now)

    def batches():
        for number in range(3):
            now.passes(1)
            yield number
        now.passes(1)  # until the end of the iterator

    for number in clock.iterate("data", batches()):
        assert number < 3
        now.passes(10)
        with clock("student"):
            now.passes(4)
    assert clock.fractions() == {"data": 0.25, "student": 0.75}


def test_phase_on_cpu_costs_less_than_20_microseconds():
    clock = Clock("cpu")
    fastest = 1.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(1000):
            with clock("student"):
                pass
        fastest = min(fastest, (time.perf_counter() - started) / 1000)
    assert fastest < 20e-6


class Event:
    """A CUDA event, recorded when its stream reaches it."""

    waits: ClassVar[int] = 0
    over: ClassVar[bool] = True
    milliseconds: ClassVar[dict[str, float]] = {}

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        self.at = Event.milliseconds[stream]

    def synchronize(self) -> None:
        Event.waits += 1

    def query(self) -> bool:
        return Event.over

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with streams ``main`` and ``side``, whose times the test sets in milliseconds."""
    Event.waits, Event.over, Event.milliseconds = 0, True, {"main": 0.0, "side": 0.0}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpu.stream)
    gpu.stream = "main"
    return Event.milliseconds


def test_gpu_is_not_synchronized_before_fractions(gpu):
    clock = Clock("cuda")
    for _ in range(100):
        with clock("data"):
            gpu["main"] += 1
        with clock("student"):
            gpu["main"] += 1
            with clock("teacher"):
                gpu["main"] += 2
    assert Event.waits == 0
    assert clock.fractions() == pytest.approx({"data": 0.25, "student": 0.25, "teacher": 0.5})
    assert Event.waits > 0


def test_phase_in_a_side_stream_is_measured_there(gpu, monkeypatch):
    clock = Clock("cuda:0")
    with clock("student"):
        gpu["main"] += 3
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "side")
        with clock("teacher"):
            gpu["side"] += 1
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
        gpu["main"] += 6
    assert clock.fractions() == pytest.approx({"student": 0.9, "teacher": 0.1})


def test_ended_spans_of_a_long_epoch_are_read(gpu):
    clock = Clock("cuda")
    for _ in range(2 * MAX_UNREAD):
        with clock("student"):
            gpu["main"] += 1
    assert len(clock._unread) <= MAX_UNREAD and Event.waits == 0
    Event.over = False
    for _ in range(2 * MAX_UNREAD):
        with clock("data"):
            gpu["main"] += 1
    assert len(clock._unread) >= 2 * MAX_UNREAD and Event.waits == 0
    assert clock.fractions() == pytest.approx({"student": 0.5, "data": 0.5})
