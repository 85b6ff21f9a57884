"""Describe the device without its host or user name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from ..runtime import allowed_cores, int8_flags


def processor_name(proc: Path = Path("/proc")) -> str:
    """Return the processor's model; on boards that do not report it, such as Raspberry Pi, the board's."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    fields: dict[str, str] = {}
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    board = _read(proc / "device-tree" / "model").strip("\0 \n")
    name = fields.get("model name") or board or fields.get("hardware") or platform.processor()
    return name or platform.machine()


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


def slugify(text: str) -> str:
    """Return a text as a part of a file name: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")[:60] or "device"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""
