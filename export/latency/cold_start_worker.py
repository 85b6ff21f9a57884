"""Measure one cold start in a process that has done nothing before.

Run as `python -m questpress.export.latency.cold_start_worker`.

One JSON line on stdin says what to load and run once; one on stdout tells how long each step took, in
milliseconds, and the most memory it had, in bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module


def main() -> None:
    request = json.loads(sys.stdin.readline())
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    begun = time.perf_counter()
    module, _, name = request["loader"].partition(":")
    load = getattr(import_module(module), name)  # brings the runtime, and numpy
    imported = time.perf_counter()
    import numpy as np

    image = np.load(request["inputs"], mmap_mode="r")[:1].copy()
    before = peak_memory()
    start = time.perf_counter()
    run = load(request["model"], request["threads"], image.shape)
    loaded = time.perf_counter()
    run(image)
    done = time.perf_counter()
    answer = {
        "import_ms": 1000 * (imported - begun),
        "session_ms": 1000 * (loaded - start),
        "first_run_ms": 1000 * (done - loaded),
        "peak_bytes": peak_memory(),
        "runtime_bytes": before,
    }
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def peak_memory() -> int | None:
    """The most memory this process has had in use, bytes; None where the system does not tell."""
    try:
        # Not getrusage's figure: that starts from the process that this one was forked from.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    if sys.platform == "darwin":
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return None


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
