"""Where a training step's time goes: a clock that is nearly free and never makes the host wait."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST_UNREAD = 4096
"""So many phases of a GPU are kept before those that are over are read."""


@dataclass(slots=True)
class _Span:
    """One run through a phase, from ``start`` to ``end``: seconds, or a GPU's events."""

    phase: str
    start: Any
    outer: "_Span | None"
    stream: Any = None
    end: Any = None
    inside: float = 0.0
    """Seconds of the phases within it, which are counted there and not here."""


class Clock:
    """Measures phases of the training loop: ``with clock("teacher"): …``.

    On a CPU a phase takes what the host took. On a GPU two events are put into the stream that is current
    when the phase begins, and nothing waits for them before :meth:`shares` is asked: a phase takes from when
    the GPU comes to its beginning to when it comes to its end, time in which it waits for the host included.
    The time of a phase within another counts for the inner one alone, unless it runs in a stream of its own,
    beside the outer one. On mps, whose work is timed by the host, a phase takes as long as its work needs to
    be handed over, and the phase that waits for the device has the rest.

    Args:
        device: where the work is done.
        now: the host's time in seconds.
    """

    def __init__(self, device: torch.device | str, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.now = now
        self._cuda = self.device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open: list[_Span] = []
        self._unread: list[_Span] = []

    def __call__(self, phase: str) -> "_Phase":
        return _Phase(self, phase)

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time it takes to get each of them counted as ``phase``."""
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def shares(self) -> dict[str, float]:
        """Each phase's share of the time in all phases since the last reset; together 1, or nothing at all.

        On a GPU this waits for the phases that are over: ask where the loop waits anyway.
        """
        self._read(wait=True)
        total = sum(self._seconds.values())
        return {phase: seconds / total for phase, seconds in self._seconds.items()} if total > 0 else {}

    def reset(self) -> None:
        """Count from here on."""
        self._seconds.clear()
        self._unread.clear()

    def _begin(self, phase: str) -> None:
        outer = self._open[-1] if self._open else None
        if self._cuda:
            stream = torch.cuda.current_stream(self.device)
            self._open.append(_Span(phase, self._event(stream), outer, stream))
        else:
            self._open.append(_Span(phase, self.now(), outer))

    def _end(self) -> None:
        span = self._open.pop()
        if self._cuda:
            span.end = self._event(span.stream)
            self._unread.append(span)
            if len(self._unread) > MOST_UNREAD:
                self._read(wait=False)
        else:
            self._count(span, self.now() - span.start)

    def _event(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _read(self, *, wait: bool) -> None:
        """Count the phases that are over on the GPU; an inner one ends, and is read, before its outer one."""
        read = 0
        for span in self._unread:
            if wait:
                span.end.synchronize()
            elif not span.end.query():
                break
            self._count(span, span.start.elapsed_time(span.end) / 1000)
            read += 1
        del self._unread[:read]

    def _count(self, span: _Span, seconds: float) -> None:
        own = max(0.0, seconds - span.inside)
        self._seconds[span.phase] = self._seconds.get(span.phase, 0.0) + own
        if span.outer is not None and span.outer.stream == span.stream:
            span.outer.inside += seconds


@dataclass(slots=True)
class _Phase:
    clock: Clock
    phase: str

    def __enter__(self) -> None:
        self.clock._begin(self.phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clock._end()
