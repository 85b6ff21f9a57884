"""A fixed computation, timed again and again: where its time changes, the machine has changed.

`python -m questpress.export.latency.sentinel` in a process of its own, pinned where the subjects are.
The computation
is a hash of the same 64 KiB: it fits every core's cache, so that its time follows the core's frequency and
whoever else is on the core, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
import time

READINGS = 5
"""Of which one answer tells the median, so that a single interrupt is no news."""

_HASHES = 16  # about two milliseconds


def main() -> None:
    """Answer every line on stdin with one reading, float64 milliseconds, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cores = json.loads(sys.stdin.buffer.readline())["cores"]
    if cores:
        os.sched_setaffinity(0, cores)
    answer({"ready": True})
    while sys.stdin.buffer.readline():
        answer({"bytes": 8, "cpu": time.process_time()}, struct.pack("d", reading()))


def reading() -> float:
    """The median of some timings of the computation, milliseconds."""
    content = bytes(64 * 1024)
    times = []
    for _ in range(READINGS):
        start = time.perf_counter_ns()
        for _ in range(_HASHES):
            hashlib.blake2b(content)
        times.append(time.perf_counter_ns() - start)
    return sorted(times)[READINGS // 2] / 1e6


def answer(head: dict[str, object], body: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + body)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
