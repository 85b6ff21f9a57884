"""Measurements within an epoch: mean losses and accuracy, and the time of each phase of a step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import JobError
from ...tasks.base import Task
from ..compute.distributed import Ranks

T = TypeVar("T")


class Meter:
    """Sums since the last reset, saved in checkpoints so that a resumed epoch counts all its steps."""

    def __init__(self, device: torch.device, ranks: Ranks, task: Task) -> None:
        self.device, self.ranks, self.task = device, ranks, task
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0
        self.has_accuracy = True

    @torch.no_grad()
    def add(self, result: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch: its losses, each a mean over the images, and its logits ``output``."""
        for key, value in result.items():
            if key != "output":
                self.sums[key] = self.sums.get(key, 0) + value.detach().float() * len(labels)
        correct = self.task.count_correct(result["output"], labels)
        self.has_accuracy = correct is not None
        if correct is not None:
            self.correct += correct
        self.images += len(labels)

    def means(self, epoch: int, *, all_ranks: bool = False) -> dict[str, float]:
        """Return mean losses of this rank, or of all. The host waits for the device here.

        Raises:
            JobError: a loss is not finite.
        """
        sums = torch.stack([*self.sums.values(), self._images().float()])
        *values, images = (self.ranks.sum(sums) if all_ranks else sums).tolist()
        means = {key: value / max(images, 1) for key, value in zip(self.sums, values, strict=True)}
        if not math.isfinite(means["loss"]):
            broken = ", ".join(key for key, value in means.items() if not math.isfinite(value))
            raise JobError(
                f"The loss became {means['loss']} in epoch {epoch + 1} ({broken}). The weights after epoch "
                f"{epoch} are kept. Try a lower --lr (or --teacher-lr), a longer --warmup-epochs or "
                "--precision fp32."
            )
        return means

    def accuracy(self) -> float | None:
        """Return the percentage of correct training views of all ranks; None if the task counts none."""
        if not self.has_accuracy:
            return None
        correct, images = self.ranks.sum(torch.stack([self.correct, self._images()])).tolist()
        return 100 * correct / images

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of all ranks. Every rank has to call this."""
        return {
            "sums": {key: self.ranks.sum(value) for key, value in self.sums.items()},
            "correct": self.ranks.sum(self.correct),
            "images": int(self.ranks.sum(self._images())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = self.ranks.keep_on_main(dict(state["sums"]))
        self.correct = self.ranks.keep_on_main({"correct": state["correct"]})["correct"]
        self.images = state["images"] if self.ranks.is_main else 0

    def _images(self) -> Tensor:
        return torch.tensor(self.images, device=self.device)


MAX_UNREAD = 4096
"""Spans of a GPU that are kept before those that have ended are read."""


@dataclass(slots=True)
class _Span:
    """Time in one phase: between two host times in seconds, or two CUDA events of a stream."""

    phase: str
    stream: Any
    start: Any
    end: Any = None


class Clock:
    """Measures phases of the training loop without synchronization: ``with clock("teacher"): …``.

    A phase within another one interrupts it, so that no time is counted twice. On a CPU (and on mps) the time
    is that of the host. On CUDA it is the time between events in the stream that is current when the phase
    begins; they are read in :meth:`fractions`. A phase in a side stream runs concurrently with the one that
    it interrupts, and both count.

    Args:
        now: the host's time in seconds.
    """

    def __init__(self, device: torch.device | str, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.now = now
        self._cuda = self.device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._current: _Span | None = None
        self._unread: list[_Span] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._current
        self._stop()
        self._start(phase, torch.cuda.current_stream(self.device) if self._cuda else None)
        try:
            yield
        finally:
            self._stop()
            if outer is not None:
                self._start(outer.phase, outer.stream)

    def iterate(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items. The time until each of them is available counts as ``phase``."""
        iterator = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def fractions(self) -> dict[str, float]:
        """Return each phase's fraction of the measured time since the last reset.

        On CUDA this waits for the phases that have ended.
        """
        self._read(wait=True)
        total = sum(self._seconds.values())
        return {phase: seconds / total for phase, seconds in self._seconds.items()} if total > 0 else {}

    def reset(self) -> None:
        self._seconds.clear()
        self._unread.clear()

    def _start(self, phase: str, stream: Any) -> None:
        self._current = _Span(phase, stream, self._event(stream) if self._cuda else self.now())

    def _stop(self) -> None:
        span, self._current = self._current, None
        if span is None:
            return
        if not self._cuda:
            self._add(span.phase, self.now() - span.start)
            return
        span.end = self._event(span.stream)
        self._unread.append(span)
        if len(self._unread) > MAX_UNREAD:
            self._read(wait=False)

    def _event(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _read(self, *, wait: bool) -> None:
        read = 0
        for span in self._unread:
            if wait:
                span.end.synchronize()
            elif not span.end.query():
                break
            self._add(span.phase, span.start.elapsed_time(span.end) / 1000)
            read += 1
        del self._unread[:read]

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
