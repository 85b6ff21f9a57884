"""`--dry-run`: estimate the time and disk space of a run without starting it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...export.runtime import allowed_cores
from ...models.catalogue import describe
from ..config.options import Options
from ..data.dataset import ImageSet
from ..report.format import plural
from ..runs.console import Display
from ..runs.device import use_threads
from ..runs.files import command_line
from ..runs.folder import RunFolder
from ..runs.results import Report
from ..tasks import task_of
from ..training.weights import check_weights

STEP = 3.0
"""Cost of a training step in forward passes: one forward, two backward."""

EFFICIENCY = 0.3
"""Rough throughput of a network in training as a fraction of that of one large convolution."""

WEIGHT_COPIES = 5
"""The teacher's weights, its ONNX file, and a checkpoint with the optimizer's two moments."""


def dry_run(
    options: Options, config: Mapping[str, Any], images: ImageSet, device: str, display: Display
) -> Report:
    """Do the checks of a run before its first stage, and print an estimate. Nothing is written.

    Raises:
        UsageError, JobError: see ``RunFolder.check``.
        ModelError: published weights do not exist or cannot be downloaded.
    """
    assert options.out is not None
    folder = RunFolder(options.out)
    folder.check(config, fresh=options.fresh)
    check_weights(options, images, folder.unfinished(options.until), download=False)
    for line in estimate(options, images, device):
        display.print(line)
    return Report(
        title="dry run",
        command=command_line(),
        method=options.method,
        image_size=options.image_size or 0,
        config=options.model_dump(mode="json"),
    )


def estimate(options: Options, data: ImageSet, device: str) -> Sequence[str]:
    """Return lines on what would run, for how long, and with how much disk space."""
    assert options.image_size and options.epochs and options.teacher_epochs
    train, size = len(data.train), options.image_size
    teachers = [describe(name, size) for name in options.teacher]
    student = describe(options.student, options.student_size or size)
    lines = [
        f"{data.name}: {len(data.classes)} classes{task_of(data).labels_note}; {train} train, "
        f"{len(data.val)} val, {len(data.test)} test images, at {size} px",
    ]
    macs = 0.0
    for teacher, weights, head in zip(teachers, options.teacher_weights, options.teacher_head, strict=True):
        text = f"teacher {teacher.name}: {teacher.parameters / 1e6:.1f} M parameters, "
        text += f"{teacher.gmacs or 0.0:.2f} GMACs, "
        if head == "none":
            lines.append(text + "without its head, as it is")
            continue
        how = "trained from scratch" if weights == "none" else "tuned, unless its head fits,"
        macs += STEP * (teacher.gmacs or 0.0) * train * options.teacher_epochs
        lines.append(f"{text}{how} for {options.teacher_epochs} epochs")
    distilling = sum(teacher.gmacs or 0.0 for teacher in teachers) if options.method != "none" else 0.0
    own = student.gmacs or 0.0
    # In each further round a student is the teacher.
    macs += (STEP * own + distilling + (options.rounds - 1) * (STEP + 1) * own) * train * options.epochs
    if options.qat:
        assert options.qat_epochs
        macs += (STEP * own + distilling) * train * options.qat_epochs
    lines.append(
        f"student {student.name}: {student.parameters / 1e6:.1f} M parameters, "
        f"{student.gmacs or 0.0:.2f} GMACs at {options.student_size or size} px, {options.epochs} epochs "
        f"with method {options.method}"
        + (f", {options.rounds} rounds" if options.rounds > 1 else "")
        + (f", and {options.qat_epochs} under fake quantization" if options.qat else "")
    )
    seconds = macs / (EFFICIENCY * measure_convolution(device))
    weight_bytes = sum(4 * network.parameters for network in [*teachers, student])
    disk = WEIGHT_COPIES * weight_bytes + train * 3 * (2 * size) ** 2
    lines.append(
        f"about {_format_duration(seconds / 60)} on {device} here, rather more than less; "
        f"about {disk / 1e9:.1f} GB of disk"
    )
    return lines


def measure_convolution(device: str) -> float:
    """Return the throughput of a 3×3 convolution over 256 channels in fp32, in GMACs per second."""
    use_threads(allowed_cores())
    layer = nn.Conv2d(256, 256, 3, padding=1).to(device)
    images = torch.randn(8, 256, 28, 28, device=device)
    macs = 8 * 28 * 28 * 256 * 256 * 9 / 1e9
    with torch.no_grad():
        layer(images).sum().item()
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < 0.3:
            layer(images).sum().item()
            runs += 1
    return macs * runs / (time.perf_counter() - started)


def _format_duration(minutes: float) -> str:
    if minutes < 90:
        return plural(max(1, round(minutes)), "minute")
    return f"{minutes / 60:.0f} hours" if minutes < 60 * 48 else f"{minutes / 60 / 24:.0f} days"
