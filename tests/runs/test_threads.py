"""The number of threads of training steps follows other load on the machine, by a clock of the test."""

from collections.abc import Iterator

import pytest
import torch
from questpress.pipeline.runs.threads import ThreadTuner, thread_counts

FREE = {1: 1.8, 2: 1.0}
BUSY = {1: 1.8, 2: 25.0}
"""Seconds of a step by threads, with a program on one of two cores: on two threads at 4 % of the speed."""


class Machine:
    def __init__(self) -> None:
        self.now = 0.0
        self.choices: list[int] = []
        self.set: list[int] = []
        self.tuner = ThreadTuner(2, use=self.choices.append, now=lambda: self.now)

    def run(self, cost: dict[int, float], steps: int) -> float:
        """Return the speed of a number of steps in steps per second."""
        started = self.now
        for _ in range(steps):
            with self.tuner.step():
                self.now += cost[torch.get_num_threads()]
        return steps / (self.now - started)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made, current = Machine(), [2]

    def set_threads(count: int) -> None:
        made.set.append(count)
        current[0] = count

    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: current[0])
    yield made
    assert current[0] == made.tuner.threads


def test_free_machine_keeps_its_threads(machine: Machine) -> None:
    assert machine.run(FREE, 1000) == pytest.approx(1)
    assert machine.set == [] and machine.choices == []


def test_busy_core_leaves_more_than_40_percent_and_a_free_one_is_used_again(machine: Machine) -> None:
    machine.run(FREE, 100)
    assert machine.run(BUSY, 1000) >= 0.4
    assert machine.choices == [1] and machine.tuner.threads == 1
    machine.run(FREE, 400)
    assert machine.choices == [1, 2]
    assert machine.run(FREE, 100) == pytest.approx(1)
    assert machine.run(BUSY, 1000) >= 0.4


def test_job_that_is_slow_for_another_reason_loses_5_percent_in_trials(machine: Machine) -> None:
    machine.run(FREE, 100)
    assert machine.run({1: 5.4, 2: 3.0}, 3000) >= 0.95 / 3
    assert machine.choices == []


def test_single_slow_steps_start_no_trial(machine: Machine) -> None:
    for _ in range(50):
        machine.run(FREE, 19)
        machine.run(BUSY, 1)
    assert machine.set == []


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 3]), (16, [1, 8, 16])])
def test_one_half_and_all_threads_are_tried(most: int, counts: list[int]) -> None:
    assert thread_counts(most) == counts


def test_half_of_the_threads_is_used_if_it_is_the_fastest(machine: Machine) -> None:
    machine.tuner = ThreadTuner(8, use=machine.choices.append, now=lambda: machine.now)
    torch.set_num_threads(8)
    machine.run({8: 1.0}, 30)
    machine.run({1: 4.0, 4: 1.2, 8: 9.0}, 30)
    assert machine.choices == [4]
