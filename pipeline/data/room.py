"""Where the training images fit: in the memory of the device, in that of the host, or in neither."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..runs.cache import Cache
from ..runs.device import free_memory
from .dataset import Image
from .decode import Canonical, canonical_key
from .headers import sampled_sizes

Resident = Literal["device", "host", "workers"]

SHARE = 0.5
"""Of the device's free memory, the host's memory and the free disk at the cache: what pixels may take."""


def choose(
    images: Sequence[Image], canonical: Canonical, device: str, cache: Cache
) -> tuple[Resident, str | None]:
    """Where these images' canonical pixels go, and where that isn't the device, why."""
    needed = canonical_bytes(images, canonical)
    size = f"decoded they take about {_gigabytes(needed)}"
    disk = free_disk(cache.root)
    # What is in the cache already needs no room on its disk.
    if needed > SHARE * disk and not cache.has("images", canonical_key(images, canonical)):
        return "workers", f"{size}, more than half of the {_gigabytes(disk)} free at {cache.root}"
    memory = host_memory()
    # A mapped file need not fit into memory, but a GPU that shares the host's wants a copy of it there.
    there = memory if device == "mps" else free_memory(device)
    if needed <= SHARE * there:
        return "device", None
    if needed > SHARE * memory:
        return "workers", f"{size}, more than half of the {_gigabytes(memory)} of memory"
    return "host", f"{size}, more than half of the {_gigabytes(there)} free on {device}"


def canonical_bytes(images: Sequence[Image], canonical: Canonical) -> float:
    """Bytes of all images in canonical form, from the headers of some of them."""
    pixels = [math.prod(canonical.size(*size)) for size in sampled_sizes(images)]
    return 3 * len(images) * sum(pixels) / len(pixels) if pixels else 0.0


def host_memory() -> float:
    """Bytes of memory this process may have: what the machine has free, or its cgroup allows where that is
    less.
    """
    limit = math.inf
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1, as a container sees them
        try:
            limit = min(limit, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):  # there is none, or it says 'max'
            continue
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the memory is taken as free
        if not hasattr(os, "sysconf"):
            return limit
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(limit, free)


def free_disk(folder: Path) -> float:
    """Bytes free where a folder is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
