"""Epochs of a training: ``metrics.jsonl`` and trackers, memory and the utilization of the device."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....models.catalogue import multiply_adds
from ...config.network import NetworkSpec
from ...runs.results import Epoch
from ..context import RunContext
from ..task import DistillationTask
from .trackers import Trackers


class EpochLog:
    """Appends epochs to ``metrics.jsonl`` and sends them to trackers. Only the main process does."""

    def __init__(self, context: RunContext, training: str) -> None:
        self.folder, self.detail = context.folder, context.display.detail
        self.trackers = Trackers(context, training) if context.ranks.is_main else None

    def __call__(self, epoch: Epoch) -> None:
        if self.trackers is None:
            return
        # A resumed training repeats the epochs that were logged after its checkpoint.
        self.folder.log_epoch(epoch)
        self.detail(_format(epoch))
        self.trackers(epoch)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()


def _format(epoch: Epoch) -> str:
    """Format as ``student epoch 3/20: loss 1.204, quest 0.310, val 71.2 %, 259 images/s``."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
    metrics = "".join(f", {name} {value:.4g}" for name, value in epoch.metrics.items())
    val = "" if epoch.val_accuracy is None else f", val {epoch.val_accuracy:.2f} %"
    throughput = f"{epoch.images_per_second:,.0f} images/s"
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}: {losses}{metrics}{val}, {throughput}"


def measure_resources(
    context: RunContext, task: DistillationTask, spec: NetworkSpec
) -> Callable[[Epoch], Epoch]:
    """Return a function that adds the peak memory and the utilization (MFU) to an epoch."""
    if torch.device(context.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    peak = peak_flops(context.device, task.engine.precision)
    macs: list[float | None] = []
    if peak is not None:
        # Teachers whose outputs are cached are not in the task and cost nothing.
        specs = [spec, *(context.round.teachers if len(task.teachers) else [])]
        macs = [multiply_adds(network.name, network.image_size, network.classes) for network in specs]

    def add(epoch: Epoch) -> Epoch:
        throughput, devices = epoch.images_per_second, context.ranks.count
        mfu = utilization(throughput, macs[0], macs[1:], peak, devices) if macs else None
        return epoch.model_copy(update={"peak_memory_bytes": peak_memory(context.device), "mfu": mfu})

    return add


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
    """Return the peak FLOP/s of a device; None if unknown, as for every CPU.

    Args:
        precision: ``bf16``, ``fp16`` or ``fp32``. Torch's fp32 convolutions use TF32 unless this is disabled.
    """
    if torch.device(device).type != "cuda":
        return None
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
        images_per_second: of all devices.
        student_gmacs: billions of multiply-adds of the trained network for one image.
        teacher_gmacs: of each teacher that runs in the step.
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
