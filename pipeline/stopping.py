"""Being told to stop: by Ctrl-C, by a scheduler's SIGTERM, or by the job's own time limit.

Anywhere in a job a stop is a KeyboardInterrupt at once; what was being made is made anew by the next run. In
training it waits for the end of the step, so that the step's place in the epoch can be saved. Who says it a
second time does not wait.
"""

import _thread
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TIME_LIMIT_EXIT = 75
"""Exit code of a job that its --time-limit has ended: EX_TEMPFAIL of sysexits.h, "try again"."""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class TimeLimit(KeyboardInterrupt):
    """The job's own --time-limit has come."""


class Stop:
    """One process's wish to stop. Signals reach the main thread alone; elsewhere nothing is ever asked."""

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self._waiting = False
        self._timer: threading.Timer | None = None
        self._expired = False

    def listen(self) -> None:
        """Take SIGTERM for Ctrl-C, and both as told above."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._told)

    def after(self, seconds: float) -> None:
        """Stop when so many seconds have passed."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """In this block a first stop only sets ``asked``."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def taken(self) -> KeyboardInterrupt:
        """The wish, which is then forgotten; another rank's, where this one has none."""
        asked, self.asked = self.asked or KeyboardInterrupt, None
        return asked()

    def _expire(self) -> None:
        self._expired = True
        _thread.interrupt_main(signal.SIGTERM)

    def _told(self, *_: object) -> None:
        kind = TimeLimit if self._expired else KeyboardInterrupt
        if self._waiting and self.asked is None:
            self.asked = kind
            return
        raise kind


STOP = Stop()
"""This process's."""


def seconds(text: str) -> float:
    """``3h50m``, ``90m``, ``45s`` or ``2d`` as seconds.

    Raises:
        ValueError: it is not of this form.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise ValueError(f"'{text}' is no time; write it as 3h50m, 90m or 45s")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
