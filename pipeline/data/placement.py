"""Data placement: decoded training images in GPU memory, in host memory, or decoded on demand by workers."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..runs.cache import Cache
from ..runs.device import free_memory
from .dataset import Image
from .decode import Canonical, canonical_key, sample_sizes

Placement = Literal["device", "host", "workers"]

MAX_FRACTION = 0.5
"""Fraction of free device memory, host memory or disk that decoded images may take."""


def choose_placement(
    images: Sequence[Image], canonical: Canonical, device: str, cache: Cache
) -> tuple[Placement, str | None]:
    """Return where the images' canonical pixels are kept, and the reason unless it is the device."""
    needed = canonical_bytes(images, canonical)
    size = f"decoded they take about {_gigabytes(needed)}"
    disk = free_disk(cache.root)
    # Images that are in the cache already need no further disk space.
    if needed > MAX_FRACTION * disk and not cache.has("images", canonical_key(images, canonical)):
        return "workers", f"{size}, more than half of the {_gigabytes(disk)} free at {cache.root}"
    memory = host_memory()
    # A memory-mapped file need not fit in memory, but a copy for a GPU that shares the host's memory must.
    available = memory if device == "mps" else free_memory(device)
    if needed <= MAX_FRACTION * available:
        return "device", None
    if needed > MAX_FRACTION * memory:
        return "workers", f"{size}, more than half of the {_gigabytes(memory)} of memory"
    return "host", f"{size}, more than half of the {_gigabytes(available)} free on {device}"


def canonical_bytes(images: Sequence[Image], canonical: Canonical) -> float:
    """Estimate the bytes of all images in canonical form from the headers of some of them."""
    pixels = [math.prod(canonical.size(*size)) for size in sample_sizes(images)]
    return 3 * len(images) * sum(pixels) / len(pixels) if pixels else 0.0


def host_memory() -> float:
    """Return the bytes of memory available to this process: free memory, or its cgroup's limit if lower."""
    limit = math.inf
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1, as seen by a container
        try:
            limit = min(limit, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):  # missing, or 'max'
            continue
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: assume that half of the memory is free
        if not hasattr(os, "sysconf"):
            return limit
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(limit, free)


def free_disk(folder: Path) -> float:
    """Return the free bytes at a folder that may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
