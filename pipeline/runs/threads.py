"""Adapt the number of threads of training steps to other programs on the machine.

Threads of a step wait for each other at each operation, so a busy program on one of the cores can slow a step
down far more than the loss of that core. Steps then are faster on fewer threads.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

SLOW = 2.0
"""A step this many times slower than usual starts a trial of other numbers of threads, or ends one."""

WINDOW_SECONDS, WINDOW_STEPS = 10.0, 3
"""Least time and steps over which the speed is measured."""

TRIAL_STEPS = 3
"""Steps of each number of threads in a trial."""

TRIAL_SECONDS, TRIAL_FRACTION = 60.0, 0.05
"""Least interval of trials, and the largest fraction of the time that they may lose."""

MIN_SPEEDUP = 1.05
"""Speedup from which another number of threads is used."""


def thread_counts(most: int) -> list[int]:
    """Return the numbers of threads to try: 1, half of ``most``, and ``most``."""
    return sorted({1, max(1, most // 2), most})


class ThreadTuner:
    """Chooses the number of threads by the time of the training steps themselves.

    If steps become slower than usual, one thread, half of the threads and all of them are tried for a few
    steps each, and the fastest number is used. As long as it is smaller than the number at the start, the
    larger ones are tried again once in a while. On a machine without other load nothing changes.

    Args:
        most: number of threads on a free machine; with 1, nothing is ever tried.
        threads: the number at the start.
        use: called with each new choice, which it can record.
        now: returns the time in seconds.
    """

    def __init__(
        self,
        most: int,
        threads: int | None = None,
        use: Callable[[int], None] = lambda _: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.most, self.use, self.now = most, use, now
        self.threads = threads or most
        self._counts = thread_counts(most)
        self._usual: dict[int, float] = {}
        self._window: list[float] = []
        self._queue: list[int] = []
        self._measured: dict[int, list[float]] = {}
        self._next_trial = -math.inf

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a training step on the number of threads that is chosen or tried."""
        if len(self._counts) == 1:
            yield
            return
        if self._queue:
            torch.set_num_threads(self._queue[0])
        started = self.now()
        yield
        seconds = self.now() - started
        if self._queue:
            self._try(seconds)
            torch.set_num_threads(self.threads)
        else:
            self._observe(seconds)

    def _observe(self, seconds: float) -> None:
        self._window.append(seconds)
        if len(self._window) < WINDOW_STEPS or sum(self._window) < WINDOW_SECONDS:
            return
        current = median(self._window)
        self._window.clear()
        usual = self._usual[self.threads] = min(current, self._usual.get(self.threads, current))
        is_slow = current > SLOW * usual
        if (is_slow or self.threads < self.most) and self.now() >= self._next_trial:
            self._measured = {self.threads: [current]}
            self._queue = [n for n in self._counts if n != self.threads and (is_slow or n > self.threads)]

    def _try(self, seconds: float) -> None:
        count, [current] = self._queue[0], self._measured[self.threads]
        times = self._measured.setdefault(count, [])
        times.append(seconds)
        if len(times) == TRIAL_STEPS or seconds > SLOW * current:
            self._queue.pop(0)
        if self._queue:
            return
        lost = sum(s - current for n, times in self._measured.items() if n != self.threads for s in times)
        self._next_trial = self.now() + max(TRIAL_SECONDS, lost / TRIAL_FRACTION)
        medians = {n: median(times) for n, times in self._measured.items()}
        best = min(medians, key=lambda n: medians[n])
        if medians[best] * MIN_SPEEDUP < current:
            self.threads = best
            self.use(best)
