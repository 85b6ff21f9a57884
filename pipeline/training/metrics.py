"""Measurements of a training: losses, accuracy, time of each phase, memory and utilization of the device."""

import math
import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import JobError
from ..tasks.base import Task
from .distributed import Ranks

T = TypeVar("T")

MAX_UNREAD = 4096
"""Spans of a GPU that are kept before those that have ended are read."""


@dataclass(frozen=True)
class Peak:
    """Dense peaks of a GPU in TFLOP/s from data sheets (half of the figures "with sparsity").

    ``tensor``: bf16 and fp16 in tensor cores, accumulated in fp32. ``tf32``: in tensor cores. ``fp32``:
    without them.
    """

    tensor: float
    tf32: float | None
    """None before Ampere, whose tensor cores support neither TF32 nor bf16."""
    fp32: float


# By torch.cuda.get_device_name without the brand. A pattern matches a whole name, so that a slower laptop
# chip, GPU slice (MIG) or virtual GPU does not get the peak of the full one.
PEAKS = {
    # NVIDIA's data sheets of HGX B200 and B300 (an eighth of the eight GPUs' figures), 2025.
    r"B[23]00": Peak(2250, 1125, 75),
    # NVIDIA H200 data sheet, 2024.
    r"H200": Peak(989.5, 494.5, 67),
    r"H200 NVL": Peak(835.5, 417.5, 60),
    # NVIDIA H100 data sheet, 2024; the PCIe card in that of 2022; GH200 data sheet, 2024.
    r"H100 80GB HBM3": Peak(989.5, 494.5, 67),
    r"H100 NVL": Peak(835.5, 417.5, 60),
    r"H100 PCIe": Peak(756.5, 378, 51),
    r"GH200 \d+G.*": Peak(990, 494, 67),
    # NVIDIA data sheets of A100 (2021), A40, A30 and A10.
    r"A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe": Peak(312, 156, 19.5),
    r"A40": Peak(149.7, 74.8, 37.4),
    r"A30": Peak(165, 82, 10.3),
    r"A10": Peak(125, 62.5, 31.2),
    # NVIDIA data sheets of L40S, L40 and L4, 2023.
    r"L40S": Peak(362, 183, 91.6),
    r"L40": Peak(181, 90.5, 90.5),
    r"L4": Peak(121, 60, 30.3),
    # NVIDIA data sheets of T4 (2019) and V100 (2020).
    r"T4": Peak(65, None, 8.1),
    r"V100-SXM2-\d+GB(-LS)?": Peak(125, None, 15.7),
    r"V100-PCIE-\d+GB": Peak(112, None, 14),
    r"V100S-PCIE-32GB": Peak(130, None, 16.4),
    # NVIDIA's white papers on GA102 (2020), Ada (2022) and RTX Blackwell (2025), and the data sheets of the
    # RTX cards. Summed in fp32, which GeForce cards do at half the rate of fp16.
    r"RTX 3090": Peak(71, 35.6, 35.6),
    r"RTX 3090 Ti": Peak(80, 40, 40),
    r"RTX 4090": Peak(165.2, 82.6, 82.6),
    r"RTX 5090": Peak(209.5, 104.8, 104.8),
    r"RTX A6000": Peak(154.8, 77.4, 38.7),
    r"RTX 6000 Ada Generation": Peak(364.2, 182.1, 91.1),
}


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device in ``bf16``, ``fp16`` or ``fp32``; None if unknown, as for CPUs."""
    if torch.device(device).type != "cuda":
        return None
    # Torch's fp32 convolutions use TF32 unless this is disabled.
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return peak_flops_by_name(torch.cuda.get_device_name(device), precision, tf32=tf32)


def peak_flops_by_name(name: str, precision: str, *, tf32: bool) -> float | None:
    """Return the peak FLOP/s of the GPU that ``torch.cuda.get_device_name`` calls ``name``."""
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name.strip())
    peak = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None:
        return None
    tera = {
        "fp16": peak.tensor,
        "bf16": peak.tensor if peak.tf32 is not None else None,
        "fp32": peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32,
    }.get(precision)
    return None if tera is None else 1e12 * tera


def utilization(
    images_per_second: float,
    student_gmacs: float | None,
    teacher_gmacs: Sequence[float | None],
    peak: float | None,
    devices: int = 1,
) -> float | None:
    """Return the fraction of the peak that the networks' arithmetic takes; None if anything is unknown.

    A multiply-add is two FLOPs, and a backward pass costs two forward passes. Methods' heads and losses are
    not counted.

    Args:
        images_per_second: throughput of all devices.
        student_gmacs: billions of multiply-adds of the trained network for one image.
        teacher_gmacs: the same for each teacher that runs in the step.
        peak: FLOP/s of one device.
    """
    teachers = [gmacs for gmacs in teacher_gmacs if gmacs is not None]
    if peak is None or student_gmacs is None or len(teachers) < len(teacher_gmacs):
        return None
    return images_per_second * 2e9 * sum([3 * student_gmacs, *teachers]) / (peak * devices)


def peak_memory(device: str) -> int | None:
    """Return the peak memory in bytes.

    On a GPU, of tensors since the last reset; otherwise of this process since its start. None on Windows.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # Linux counts in KiB


class Meter:
    """Sums since the last reset, saved in checkpoints so that a resumed epoch counts all its steps."""

    def __init__(self, device: torch.device, ranks: Ranks, task: Task) -> None:
        self.device, self.ranks, self.task = device, ranks, task
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = self.labeled = 0
        self.has_accuracy = True

    @torch.no_grad()
    def add(self, result: Mapping[str, Tensor], labels: Tensor, images: int) -> None:
        """Add a batch of images: its losses, each a mean over them, and its logits ``output``.

        The labels are those of the first images.
        """
        logits = result["output"]
        for key, value in result.items():
            if key != "output":
                self.sums[key] = self.sums.get(key, 0) + value.detach().float() * images
        correct = self.task.count_correct(logits[: len(labels)], self.task.main_labels(labels))
        self.has_accuracy = correct is not None
        if correct is not None:
            self.correct += correct
        self.images += images
        self.labeled += len(labels)

    def means(self, epoch: int, *, all_ranks: bool = False) -> dict[str, float]:
        """Return mean losses of this rank, or of all, or raise JobError if one is not finite.

        The host waits for the device here.
        """
        sums = torch.stack([*self.sums.values(), self._count(self.images).float()])
        *values, images = (self.ranks.sum(sums) if all_ranks else sums).tolist()
        means = {key: value / max(images, 1) for key, value in zip(self.sums, values, strict=True)}
        if not math.isfinite(means["loss"]):
            broken = ", ".join(key for key, value in means.items() if not math.isfinite(value))
            raise JobError(
                f"The loss became {means['loss']} in epoch {epoch + 1} ({broken}). "
                "Try a lower --lr (or --teacher-lr), a longer --warmup-epochs or --precision fp32."
            )
        return means

    def accuracy(self) -> float | None:
        """Return the percentage of correct training views of all ranks; None if the task counts none."""
        if not self.has_accuracy:
            return None
        counts = torch.stack([self.correct, self._count(self.labeled)])
        correct, labeled = self.ranks.sum(counts).tolist()
        return 100 * correct / labeled

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of all ranks. Every rank has to call this."""
        return {
            "sums": {key: self.ranks.sum(value) for key, value in self.sums.items()},
            "correct": self.ranks.sum(self.correct),
            "images": int(self.ranks.sum(self._count(self.images))),
            "labeled": int(self.ranks.sum(self._count(self.labeled))),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = self.ranks.keep_on_main(dict(state["sums"]))
        self.correct = self.ranks.keep_on_main({"correct": state["correct"]})["correct"]
        self.images, self.labeled = (state["images"], state["labeled"]) if self.ranks.is_main else (0, 0)

    def _count(self, images: int) -> Tensor:
        return torch.tensor(images, device=self.device)


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
    it interrupts, and both count. ``now`` returns the host's time in seconds.
    """

    def __init__(self, device: torch.device | str, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.now = now
        self._cuda = self.device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._current: _Span | None = None
        self._unread: deque[_Span] = deque()

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
            self._seconds[span.phase] += self.now() - span.start
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
        while self._unread and (wait or self._unread[0].end.query()):
            span = self._unread.popleft()
            if wait:
                span.end.synchronize()
            self._seconds[span.phase] += span.start.elapsed_time(span.end) / 1000
