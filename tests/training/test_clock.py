"""The clock of the training loop, by a time that the test sets."""

import time
from typing import ClassVar

import pytest
import torch
from questpress.pipeline.training.monitoring.profiling import MOST_UNREAD, Clock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_shares_are_those_of_the_time_and_sum_to_1():
    now = Time()
    clock = Clock("cpu", now)
    for _ in range(3):
        with clock("data"):
            now.passes(1)
        now.passes(50)  # in no phase
        with clock("teacher"):
            now.passes(2)
        with clock("student"):
            now.passes(5)
    assert clock.shares() == pytest.approx({"data": 1 / 8, "teacher": 2 / 8, "student": 5 / 8})


def test_the_time_of_an_inner_phase_is_not_the_outer_ones():
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
    assert clock.shares() == pytest.approx({"data": 0.4, "teacher": 0.3, "student": 0.3})


def test_a_phase_within_one_of_its_own_name_is_counted_once():
    now = Time()
    clock = Clock("cpu", now)
    with clock("student"):
        now.passes(1)
        with clock("student"):
            now.passes(2)
    with clock("data"):
        now.passes(3)
    assert clock.shares() == pytest.approx({"student": 0.5, "data": 0.5})


def test_after_a_reset_counting_begins_anew_and_without_time_there_are_no_shares():
    now = Time()
    clock = Clock("cpu", now)
    assert clock.shares() == {}
    with clock("data"):
        now.passes(3)
    clock.reset()
    assert clock.shares() == {}
    with clock("student"):
        now.passes(1)
    assert clock.shares() == {"student": 1.0}


def test_a_phase_that_fails_is_over():
    now = Time()
    clock = Clock("cpu", now)
    with pytest.raises(RuntimeError), clock("student"):
        now.passes(2)
        raise RuntimeError
    with clock("data"):
        now.passes(2)
    assert clock.shares() == {"student": 0.5, "data": 0.5}


def test_waiting_for_each_item_is_a_phase_and_what_is_done_with_it_is_not():
    now = Time()
    clock = Clock("cpu", now)

    def batches():
        for number in range(3):
            now.passes(1)
            yield number
        now.passes(1)  # finding out that there are no more

    for number in clock.each("data", batches()):
        assert number < 3
        now.passes(10)
        with clock("student"):
            now.passes(4)
    assert clock.shares() == {"data": 0.25, "student": 0.75}


def test_a_phase_on_a_cpu_costs_less_than_20_microseconds():
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
    """A GPU's event: what is put into a stream happens when the stream comes to it."""

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
    """A GPU with a stream ``main`` and another, ``side``, whose times the test sets in milliseconds."""
    Event.waits, Event.over, Event.milliseconds = 0, True, {"main": 0.0, "side": 0.0}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpu.stream)
    gpu.stream = "main"
    return Event.milliseconds


def test_on_a_gpu_nothing_waits_before_the_shares_are_asked_for(gpu):
    clock = Clock("cuda")
    for _ in range(100):
        with clock("data"):
            gpu["main"] += 1
        with clock("student"):
            gpu["main"] += 1
            with clock("teacher"):
                gpu["main"] += 2
    assert Event.waits == 0
    assert clock.shares() == pytest.approx({"data": 0.25, "student": 0.25, "teacher": 0.5})
    assert Event.waits > 0


def test_a_stream_beside_the_main_one_takes_nothing_from_its_phases(gpu, monkeypatch):
    clock = Clock("cuda:0")
    with clock("student"):
        gpu["main"] += 3
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "side")
        with clock("teacher"):
            gpu["side"] += 1
            gpu["main"] += 3
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
        gpu["main"] += 3
    assert clock.shares() == pytest.approx({"student": 0.9, "teacher": 0.1})


def test_of_a_long_epoch_only_the_phases_under_way_are_kept(gpu):
    clock = Clock("cuda")
    for _ in range(2 * MOST_UNREAD):
        with clock("student"):
            gpu["main"] += 1
    assert len(clock._unread) <= MOST_UNREAD and Event.waits == 0
    Event.over = False
    for _ in range(2 * MOST_UNREAD):
        with clock("data"):
            gpu["main"] += 1
    assert len(clock._unread) >= 2 * MOST_UNREAD and Event.waits == 0
    assert clock.shares() == pytest.approx({"student": 0.5, "data": 0.5})
