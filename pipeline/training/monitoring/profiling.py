"""Where a training step's time goes: a clock that is nearly free and never makes the host wait."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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


@dataclass(frozen=True)
class Peak:
    """A GPU's dense peaks in TFLOP/s, as its vendor states them; half of those stated "with sparsity".

    ``tensor``: bf16 and fp16 in the tensor cores, summed in fp32. ``tf32``: likewise. ``fp32``: without them.
    """

    tensor: float
    tf32: float | None
    """None before Ampere, whose tensor cores know neither TF32 nor bf16."""
    fp32: float


# By torch.cuda.get_device_name without the brand. Each pattern is a whole name, so that a laptop's chip, a
# slice of a GPU (MIG) or a virtual one, which are slower, is not taken for the full one.
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


def peak(device: torch.device | str, precision: str) -> float | None:
    """FLOP/s of a device at best; None where that is not known, as of every CPU.

    Args:
        precision: ``bf16``, ``fp16`` or ``fp32``. torch's convolutions compute in TF32 where fp32 is asked
            for and nobody has forbidden it: then it is TF32's peak.
    """
    if torch.device(device).type != "cuda":
        return None
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return peak_of(torch.cuda.get_device_name(device), precision, tf32=tf32)


def peak_of(name: str, precision: str, *, tf32: bool) -> float | None:
    """The same by the GPU's name."""
    plain = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name.strip())
    known = next((of for pattern, of in PEAKS.items() if re.fullmatch(pattern, plain)), None)
    if known is None:
        return None
    tera = {
        "fp16": known.tensor,
        "bf16": known.tensor if known.tf32 is not None else None,
        "fp32": known.tf32 if tf32 and known.tf32 is not None else known.fp32,
    }.get(precision)
    return None if tera is None else 1e12 * tera


def training_flops(gmacs: float) -> float:
    """FLOPs of a training step for one image: the backward pass costs two forward ones."""
    return 3 * inference_flops(gmacs)


def inference_flops(gmacs: float) -> float:
    """FLOPs of a frozen teacher's forward pass for one image: a multiply-add is two."""
    return 2e9 * gmacs


def utilisation(
    images_per_second: float,
    student_gmacs: float | None,
    teachers_gmacs_online: Sequence[float | None],
    peak: float | None,
    devices: int = 1,
) -> float | None:
    """The share of the peak, 0 to 1, that the networks' own arithmetic takes; None where anything is unknown.

    Methods' heads and losses are not counted.

    Args:
        images_per_second: of all devices together.
        student_gmacs: billions of multiply-adds of what is trained, for one image.
        teachers_gmacs_online: of each teacher that answers in the step; none where its answers are stored.
        peak: FLOP/s of one device.
    """
    if peak is None or student_gmacs is None:
        return None
    flops = training_flops(student_gmacs)
    for gmacs in teachers_gmacs_online:
        if gmacs is None:
            return None
        flops += inference_flops(gmacs)
    return images_per_second * flops / (peak * devices)


def peak_memory(device: str) -> int | None:
    """Bytes at most in use: by tensors on a GPU since :func:`forget_peak`, else by this process so far.

    None where the system does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # Linux counts in KiB


def forget_peak(device: str) -> None:
    """Let a GPU's peak be that of what comes; a process cannot forget its own."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
