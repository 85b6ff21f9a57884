"""Describe the device without its host or user name."""

from __future__ import annotations

import os
import platform
from typing import Any

from ..runtime.processor import allowed_cores, int8_flags, processor_name


def describe_device() -> dict[str, Any]:
    """Return the processor, its instruction sets for int8, allowed cores, memory in bytes, and the system."""
    try:
        memory: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = None
    return {
        "processor": processor_name(),
        "machine": platform.machine(),
        "flags": list(int8_flags()),
        "cores": allowed_cores(),
        "memory_bytes": memory,
        # The rest of the release is a name that the builder of the kernel chose.
        "system": f"{platform.system()} {platform.release().split('-')[0]}".strip(),
    }
