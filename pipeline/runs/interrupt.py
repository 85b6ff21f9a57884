"""Being told to stop: by Ctrl-C, by a scheduler's SIGTERM, or by the job's own time limit.

Anywhere in a job a stop is a KeyboardInterrupt at once; what was being made is made anew by the next run. In
training it waits for the end of the step, so that the step's place in the epoch can be saved. Who says it a
second time does not wait.
"""

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...export.text import escape_controls

TIME_LIMIT_EXIT = 75
"""Exit code of a job that its --time-limit has ended: EX_TEMPFAIL of sysexits.h, "try again"."""

SAME_SECONDS = 1.0
"""Signals within so long are one: a scheduler tells torchrun and its processes, and torchrun tells these."""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class TimeLimit(KeyboardInterrupt):
    """The job's own --time-limit has come."""


KINDS: tuple[type[KeyboardInterrupt] | None, ...] = (None, KeyboardInterrupt, TimeLimit)
"""Wishes by number, the stronger later."""


class Stop:
    """One process's wish to stop. Signals reach the main thread alone; in another one only the time limit is
    heard, and only by a training.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self._waiting = False
        self._hears = False
        self._expired = False
        self._last = -math.inf

    @contextmanager
    def listens(self) -> Iterator[None]:
        """In this block SIGTERM is taken for Ctrl-C, and both as told above.

        Jobs of several threads take turns here: signals, torch's random numbers and its threads belong to
        the process, and a job that shared them would not end as it ends alone.
        """
        with self._turn:
            self._forget()
            before: dict[signal.Signals, Any] = {}
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    # A shell has its background jobs ignore Ctrl-C.
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        before[number] = signal.signal(number, self._told)
            self._hears = signal.SIGTERM in before
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        """The block is stopped when so many seconds have passed; None: never."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """In this block a first stop only sets ``asked``."""
        if self._expired and not self._hears:
            self.asked = TimeLimit
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @property
    def wish(self) -> int:
        """What is asked, as a number of ``KINDS``."""
        return KINDS.index(self.asked)

    def taken(self, wish: int) -> KeyboardInterrupt:
        """A wish, this process's or another's, as an exception; what was asked here is then forgotten."""
        self.asked = None
        return (KINDS[wish] or KeyboardInterrupt)()

    def _expire(self) -> None:
        self._expired = True
        if not self._hears:
            if self._waiting:
                self.asked = TimeLimit
        elif hasattr(signal, "pthread_kill"):
            # A real signal, which also ends the main thread's waiting for another process.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # type: ignore[arg-type]
        else:
            import _thread

            _thread.interrupt_main(signal.SIGTERM)

    def _told(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last < SAME_SECONDS:
            return
        self._last = now
        kind = TimeLimit if self._expired else KeyboardInterrupt
        if self._waiting and self.asked is None:
            self.asked = kind
            return
        raise kind


STOP = Stop()
"""This process's."""


def parse_time(text: str) -> float:
    """``3h50m``, ``90m``, ``45s`` or ``2d`` as seconds.

    Raises:
        ValueError: it is not of this form.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise ValueError(f"'{escape_controls(text)}' is no time; write it as 3h50m, 90m or 45s")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
