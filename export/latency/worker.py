"""The processes of a bench: `python -m questpress.export.latency.worker MODE [RUNTIME]`.

    run RUNTIME          time runs of a model file
    end-to-end           time the steps from an image file to a prediction
    sentinel             time a fixed computation
    cold-start RUNTIME   time the import of the runtime, loading a file, and its first run

Requests are JSON lines on stdin. The reply to each is one JSON line on stdout, followed by samples as raw
float64: wall times, and with two `columns` as many processor times. The first request names what is timed:
`model`, `inputs`, `threads` and `cores`; each further one requests a block of runs of at
least `seconds`. Between requests the process blocks, so that it uses no processor time.

numpy and the runtimes are imported where they are used: a cold start times their import, and the sentinel
needs neither.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


Request = dict[str, Any]

Run = Callable[["np.ndarray"], object]
"""Runs one batch, float32 [B, 3, H, W] or uint8 [B, H, W, 3]."""

Load = Callable[[str, int, tuple[int, ...]], Run]
"""Loads a model file for a number of threads and an input shape, [B, 3, H, W] or [B, H, W, 3]."""

Block = Callable[[Request], Sequence[float]]
"""Times a block of runs, milliseconds."""


def main(arguments: Sequence[str]) -> None:
    """Serve requests in the mode named on the command line."""
    mode, *runtimes = arguments
    if mode == "run":
        serve(LOADERS[runtimes[0]], any_batch=runtimes[0] == "onnxruntime")
    elif mode == "cold-start":
        _reply_to_requests(partial(_start_cold_start, runtimes[0]))
    else:
        _reply_to_requests({"end-to-end": _start_end_to_end, "sentinel": lambda _: read_sentinel}[mode])


def serve(load: Load, *, any_batch: bool = False) -> None:
    """Time a model file in any runtime until stdin ends, which it does when the parent exits.

    With `any_batch` one loaded model takes every batch size; otherwise it is loaded again for each.
    """
    _reply_to_requests(lambda request: ModelRuns(load, request, any_batch=any_batch).time_block, columns=2)


def _reply_to_requests(start: Callable[[Request], Block], columns: int = 1) -> None:
    """Read requests until stdin ends: `start` takes the first one and returns the function for the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not be mixed with replies

    def reply(samples: Sequence[float] = (), **head: str) -> None:
        body = array("d", samples).tobytes()
        line = json.dumps({"bytes": len(body), "columns": columns, "cpu": time.process_time(), **head})
        output.write(line.encode() + b"\n" + body)
        output.flush()

    try:
        first = json.loads(sys.stdin.buffer.readline())
        if first["cores"]:
            os.sched_setaffinity(0, first["cores"])  # before the runtime starts threads, which inherit it
        block = start(first)
        reply()
        while line := sys.stdin.buffer.readline():
            reply(block(json.loads(line)))
    except Exception as error:  # the parent raises it
        reply(error=" ".join(f"{type(error).__name__}: {error}".split()))


# ---------------------------------------------------------------------------------------------------------
# Runs of a model file


def load_onnxruntime(model: str, threads: int, _shape: tuple[int, ...]) -> Run:
    """Load a file with the options that questpress ships with."""
    from .. import runtime

    session = runtime.open_session(model, threads)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def load_openvino(model: str, threads: int, shape: tuple[int, ...]) -> Run:
    """Load a file for the lowest latency: a fixed shape, one stream, one request, inputs not copied."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    network.reshape(shape)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    try:
        request = core.compile_model(network, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        if "No suitable implementations" not in str(error):
            raise
        raise RuntimeError(
            "OpenVINO has no kernel for a layer of this model on this processor. Set "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI in the environment to disable AMX."
        ) from error
    return lambda batch: request.infer({0: batch}, share_inputs=True)[0]


LOADERS: dict[str, Load] = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}


class ModelRuns:
    """A loaded model file that is run on its inputs in turn."""

    def __init__(self, load: Load, request: Request, *, any_batch: bool = False) -> None:
        import numpy as np

        self._load, self._any_batch, self._request = load, any_batch, request
        self._images = np.load(request["inputs"])
        self._batch = 0
        self._set_batch(1)
        gc.disable()  # a collection would make one run slow

    def _set_batch(self, batch: int) -> None:
        """Cut the inputs into batches of another size, each starting where the previous one ends."""
        import numpy as np

        if batch == self._batch:
            return
        count = max(1, len(self._images) // batch)
        indices = np.arange(count * batch).reshape(count, batch) % len(self._images)
        self._inputs = [np.ascontiguousarray(self._images[rows]) for rows in indices]
        self._next = 0
        if not self._batch or not self._any_batch:
            shape = self._inputs[0].shape
            self._run = self._load(self._request["model"], self._request["threads"], shape)
        self._batch = batch

    def time_block(self, request: Request) -> list[float]:
        """Run for at least `seconds` and at least once.

        Returns each run's time, then each run's processor time in all threads, milliseconds.
        """
        self._set_batch(request.get("batch", 1))
        times, processor_times = [], []
        clock, processor_clock = time.perf_counter_ns, time.process_time_ns
        run = self._run
        end = clock() + int(request["seconds"] * 1e9)
        while True:
            batch = self._inputs[self._next]
            self._next = (self._next + 1) % len(self._inputs)
            before = processor_clock()
            start = clock()
            run(batch)
            stop = clock()
            processor_times.append(processor_clock() - before)
            times.append(stop - start)
            if stop >= end:
                return [nanoseconds / 1e6 for nanoseconds in times + processor_times]


# ---------------------------------------------------------------------------------------------------------
# From an image file to a prediction

STEPS = ("decode", "resize", "normalize", "run")


def _start_end_to_end(first: Request) -> Block:
    import numpy as np

    from ..runtime import open_model, render

    model = open_model(first["model"], threads=first["threads"])
    images = cycle(sorted(Path(first["inputs"]).iterdir()))
    gc.disable()

    def block(request: Request) -> list[float]:
        """Return the times of `STEPS` for each image in turn; `run` includes decoding detections."""
        times: list[float] = []
        clock, end = time.perf_counter_ns, time.perf_counter() + request["seconds"]
        while not times or time.perf_counter() < end:
            image = next(images)
            marks = [clock()]
            pixels = model.decode(image)
            marks.append(clock())
            rendered = render(pixels, model.preprocessing)
            marks.append(clock())
            batch = np.ascontiguousarray(model.to_input(rendered[None]))
            marks.append(clock())
            model.probabilities(model.infer(batch))
            marks.append(clock())
            times += [(after - before) / 1e6 for before, after in pairwise(marks)]
        return times

    return block


# ---------------------------------------------------------------------------------------------------------
# The sentinel

SENTINEL_READINGS = 5
"""A reading is the median of these, so that a single interrupt does not change it."""

_HASHES = 16  # about two milliseconds


def read_sentinel(_request: Request) -> list[float]:
    """Time hashing 64 KiB, milliseconds.

    The data fits every core's cache, so the time depends only on the core's frequency and on other processes
    on the core.
    """
    content = bytes(64 * 1024)
    times = []
    for _ in range(SENTINEL_READINGS):
        start = time.perf_counter_ns()
        for _ in range(_HASHES):
            hashlib.blake2b(content)
        times.append(time.perf_counter_ns() - start)
    return [sorted(times)[SENTINEL_READINGS // 2] / 1e6]


# ---------------------------------------------------------------------------------------------------------
# Cold start

COLD_START = ("import_ms", "session_ms", "first_run_ms", "peak_bytes", "runtime_bytes")
"""NaN is memory that the system does not report."""


def _start_cold_start(runtime: str, first: Request) -> Block:
    """Start up when the first block is requested; its figures are those named in `COLD_START`."""

    def block(_request: Request) -> list[float]:
        start = time.perf_counter()
        if runtime == "openvino":
            import openvino  # noqa: F401
        else:
            from .. import runtime as _  # noqa: F401
        import numpy as np

        imported = time.perf_counter()
        image = np.load(first["inputs"], mmap_mode="r")[:1].copy()
        runtime_bytes = peak_memory()
        before = time.perf_counter()
        run = LOADERS[runtime](first["model"], first["threads"], image.shape)
        loaded = time.perf_counter()
        run(image)
        seconds = (imported - start, loaded - before, time.perf_counter() - loaded)
        return [*(1000 * step for step in seconds), peak_memory(), runtime_bytes]

    return block


def peak_memory() -> float:
    """Return the peak resident memory of this process in bytes, NaN if the system does not report it."""
    try:
        # Not getrusage's value, which starts from the process that this one was forked from.
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float("nan")


if __name__ == "__main__":
    main(sys.argv[1:])
