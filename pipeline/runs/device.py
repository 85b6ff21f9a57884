"""Where training runs, and in which arithmetic."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...export.latency.machine import environment
from ...export.runtime import allowed_cores
from ..errors import UsageError


@dataclass(frozen=True)
class Engine:
    """How a training step is computed; exact repetition needs the same engine."""

    device: str
    threads: int
    precision: str
    """``fp32``, or ``bf16`` for autocast."""
    layout: str = "channels_last"
    """Of maps and weights in memory: ``channels_last`` or ``contiguous``."""
    compile: str = "off"
    """``off``, or the mode of torch.compile: ``default``, or ``reduce-overhead`` for CUDA graphs."""
    heads: str = "as the network"
    """The matrix products of the methods' heads: ``bf16``, or ``as the network``."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Engine":
        """The engine that ``dataclasses.asdict`` wrote down, perhaps before it had all of today's fields."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    @property
    def compile_mode(self) -> str | None:
        """What ``Readouts.compile_features`` takes."""
        return None if self.compile == "off" else self.compile

    def __str__(self) -> str:
        parts = [self.precision, self.layout.replace("_", " ")]
        if torch.device(self.device).type == "cpu":
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.compile != "off":
            parts.append("compiled" + (" to CUDA graphs" if self.compile == "reduce-overhead" else ""))
        return ", ".join(parts)

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def autocast_heads(self) -> torch.autocast:
        """For the methods, inside ``autocast``."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled="bf16" in (self.precision, self.heads))


def choose_device(asked: str | None, local_rank: int | None = None) -> str:
    """``asked`` if it is there, else the first of cuda, mps and cpu; of several ranks each has its own GPU.

    Raises:
        UsageError: the device asked for does not exist on this machine.
    """
    if local_rank is not None and torch.cuda.is_available() and asked in (None, "cuda"):
        asked = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    kind, _, number = asked.partition(":")
    if kind not in there or (number and not number.isdigit()):
        raise UsageError(f"--device {asked}: choose cuda, cuda:1, mps or cpu.")
    if not there[kind]:
        raise UsageError(
            f"--device {asked}: this machine has none that torch can use; leave it out or say cpu."
        )
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {asked}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        )
    return asked


def choose_engine(device: str, precision: str, network: nn.Module) -> Engine:
    """The engine for training ``network``; ``precision`` is ``auto``, ``fp32`` or ``bf16``.

    On a GPU bf16 pays. On a CPU it does where the processor multiplies in bf16, for networks of dense
    convolutions and matrices; depthwise convolutions are slower in it than in fp32 (benchmarks/training/precision.py).
    The methods' heads are matrices.
    """
    pays = precision == "auto" and bf16_pays(device)
    if precision == "auto":
        precision = "bf16" if pays and not (device == "cpu" and depthwise(network)) else "fp32"
    heads = "bf16" if pays and precision == "fp32" else "as the network"
    return Engine(device, threads(), precision, heads=heads)


def threads() -> int:
    """Threads for this process: the cores that the job may use, shared with the ranks of this machine."""
    return max(1, allowed_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def inference_engine(device: str, precision: str) -> Engine:
    """The engine of a frozen teacher, whose depthwise convolutions gain from bf16 too."""
    if precision == "auto":
        precision = "bf16" if bf16_pays(device) else "fp32"
    return Engine(device, threads(), precision)


def bf16_pays(device: str) -> bool:
    """Whether the device multiplies matrices of bf16 numbers in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has_bf16()


def depthwise(network: nn.Module) -> bool:
    """Whether the network has depthwise convolutions."""
    return any(
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        for module in network.modules()
    )


def device_name(device: str) -> str:
    """What the GPU or the processor is called."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return environment().cpu


def free_memory(device: str) -> float:
    """Bytes free on a GPU of its own memory; no limit where the device shares the host's."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else math.inf


def cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Processor cores this process may use, where ``allowed_cores`` counts a core's hyper-threads each."""
    try:
        siblings = {
            (root / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
            for number in os.sched_getaffinity(0)
        }
    except (AttributeError, OSError):  # not Linux, or a system that does not tell
        return allowed_cores()
    return min(len(siblings), allowed_cores())


def use_threads(threads: int) -> None:
    """Give torch this many threads, and no more than this job may use."""
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
