"""Devices, precision and threads."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...export.latency.machine import environment
from ...export.runtime import allowed_cores, processor
from ...models.build import fits_bf16
from ..errors import JobError, UsageError
from . import process


@dataclass(frozen=True)
class Engine:
    """Device, precision and memory layout of training. Exact repetition requires the same engine."""

    device: str
    threads: int
    precision: str
    """``fp32``, or ``bf16`` or ``fp16`` for autocast."""
    layout: str = "channels_last"
    """Memory layout of features and weights: ``channels_last`` or ``contiguous``."""
    compile: str = "off"
    """``off``, or the mode of torch.compile: ``default``, or ``reduce-overhead`` for CUDA graphs."""
    heads: str = "as the network"
    """Precision of the methods' heads: ``bf16``, or ``as the network``."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Engine":
        """Create an engine from its fields in a run's record."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    @property
    def compile_mode(self) -> str | None:
        """The mode for ``Readouts.compile_features``."""
        return None if self.compile == "off" else self.compile

    def __str__(self) -> str:
        parts = [self.precision, self.layout.replace("_", " ")]
        if torch.device(self.device).type == "cpu":
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.compile != "off":
            parts.append("compiled" + (" to CUDA graphs" if self.compile == "reduce-overhead" else ""))
        return ", ".join(parts)

    @property
    def half(self) -> torch.dtype:
        """The type of autocast."""
        return torch.float16 if self.precision == "fp16" else torch.bfloat16

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=self.half, enabled=self.precision != "fp32")

    def autocast_heads(self) -> torch.autocast:
        """Return the context of the methods' heads, inside ``autocast``."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=self.half, enabled=self.precision != "fp32" or self.heads == "bf16")


def choose_device(device: str | None, local_rank: int | None = None) -> str:
    """Return ``device`` or the first available of cuda, mps and cpu; with several ranks, the rank's GPU."""
    if local_rank is not None and torch.cuda.is_available() and device in (None, "cuda"):
        device, count = f"cuda:{local_rank}", torch.cuda.device_count()
        if local_rank >= count:
            raise UsageError(
                f"LOCAL_RANK: each process needs a separate GPU, got {local_rank} with {count} GPUs. "
                "Start at most one process per GPU."
            )
        torch.cuda.set_device(local_rank)
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = device.partition(":")
    if kind not in available or (number and not number.isdigit()):
        raise UsageError(f"--device must be cuda, cuda:N, mps or cpu, got {device}.")
    if not available[kind]:
        raise UsageError(f"--device {device} is not available on this machine. Remove it or set it to cpu.")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device} does not exist. Available: cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        )
    return device


def choose_engine(device: str, precision: str, network: nn.Module) -> Engine:
    """Return the engine for training ``network``; ``precision`` is ``auto``, ``fp32`` or ``bf16``.

    16 bits are faster on GPUs, and on CPUs that multiply in bf16 for dense convolutions and matrix products
    such as the methods' heads. Depthwise convolutions are slower (benchmarks/training/precision.py).
    """
    heads, precision = "as the network", allowed_precision(device, precision, network)
    if precision == "auto":
        precision = fastest_precision(device)
        convs = (module for module in network.modules() if isinstance(module, nn.Conv2d))
        is_depthwise = any(conv.groups == conv.in_channels > 1 for conv in convs)
        if precision == "bf16" and device == "cpu" and is_depthwise:
            precision, heads = "fp32", "bf16"
    return Engine(device, threads(), precision, heads=heads)


def allowed_precision(device: str, precision: str, network: nn.Module) -> str:
    """Return ``fp32`` in place of ``auto`` for a network whose gradients would be wrong in bf16."""
    built_as = getattr(network, "built_as", None)
    if precision != "auto" or device != "cpu" or built_as is None:
        return precision
    return "auto" if fits_bf16(built_as.name, built_as.image_size) else "fp32"


@contextmanager
def fix_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in torch and in ONNX Runtime during the block; None keeps the defaults.

    Sums are split over threads, so results are equal to the byte only with equal numbers.
    """
    before, torch_before = processor.THREADS, torch.get_num_threads()
    processor.THREADS = count
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        processor.THREADS = before
        torch.set_num_threads(torch_before)


@contextmanager
def select_kernels(deterministic: bool) -> Iterator[None]:
    """Use deterministic operations during the block, or cuDNN's fastest convolutions for each shape.

    Without the former, sums of some gradients on a GPU depend on the order in which its threads finish. The
    latter are found by timing: the shapes of a training do not change.

    Raises:
        JobError: an operation has no deterministic form on the device.
    """
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic = True
    try:
        yield
    except RuntimeError as error:
        operation, text, _ = str(error).partition(" does not have a deterministic implementation")
        if not deterministic or not text:
            raise
        raise JobError(
            f"--deterministic: {operation} has no deterministic form on this device. Omit the option, or use "
            "another network or method."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def threads() -> int:
    """Return the threads of this process: those fixed, or the allowed cores divided by the local ranks."""
    return processor.THREADS or max(1, allowed_cores() // process.count_local_processes())


def inference_engine(device: str, precision: str) -> Engine:
    """Return the engine of a frozen teacher, whose depthwise convolutions are faster in bf16 too."""
    return Engine(device, threads(), fastest_precision(device) if precision == "auto" else precision)


def fastest_precision(device: str) -> str:
    """Return ``bf16``; ``fp16`` for NVIDIA's Volta and Turing, which lack bf16; ``fp32`` without either."""
    if bf16_pays(device):
        return "bf16"
    is_cuda = torch.device(device).type == "cuda"
    return "fp16" if is_cuda and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


def bf16_pays(device: str) -> bool:
    """Return True if the device multiplies bf16 matrices in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def device_name(device: str) -> str:
    """Return the name of the GPU or processor."""
    is_cuda = torch.device(device).type == "cuda"
    return str(torch.cuda.get_device_name(device)) if is_cuda else environment().cpu


def free_memory(device: str) -> float:
    """Return the free bytes of a GPU; infinity for a device that shares the host's memory."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else math.inf


def cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the physical cores that this process may use; ``allowed_cores`` counts hyper-threads."""
    try:
        siblings = {
            (root / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
            for number in os.sched_getaffinity(0)
        }
    except (AttributeError, OSError):  # not Linux, or no topology
        return allowed_cores()
    return min(len(siblings), allowed_cores())


def use_threads(threads: int) -> None:
    """Set the number of torch's threads, and that of child processes unless OMP_NUM_THREADS is set."""
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
