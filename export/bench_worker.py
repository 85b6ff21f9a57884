"""One network in a process of its own, timed on request: `python -m questpress.export.bench_worker`.

Requests are JSON lines on stdin, answered by one JSON line each on stdout; a block's answer is followed by
its samples, float64 milliseconds, as raw bytes. Between requests the process blocks, so that it costs the
others nothing. It imports what the device has, and nothing more.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from . import runtime

Run = Callable[[np.ndarray], object]
"""Answers one image, float32 [1, 3, S, S]."""


def main() -> None:
    """Time model files in ONNX Runtime, with the options they ship with."""
    serve(_in_onnxruntime)


def _in_onnxruntime(model: str, threads: int, _shape: tuple[int, ...]) -> Run:
    session = runtime.session(model, threads)
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def serve(load: Callable[[str, int, tuple[int, ...]], Run]) -> None:
    """Serve until stdin ends, which it does when the parent is gone.

    `load` opens a model file for so many threads and inputs of one shape, [1, 3, S, S], in the runtime that
    is timed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    requests = sys.stdin.buffer
    try:
        subject = Subject(load, json.loads(requests.readline()))
        _answer(answers, {"ready": True})
        gc.disable()
        while line := requests.readline():
            samples = subject.block(json.loads(line)["seconds"])
            _answer(answers, {"bytes": samples.nbytes}, samples.tobytes())
    except Exception as error:  # told to the parent, which raises it
        _answer(answers, {"error": " ".join(f"{type(error).__name__}: {error}".split())})


class Subject:
    """A model file and the inputs it is timed on, batch 1, in turn."""

    def __init__(self, load: Callable[[str, int, tuple[int, ...]], Run], request: dict[str, Any]) -> None:
        inputs = np.load(request["inputs"])
        self._inputs = [np.ascontiguousarray(inputs[i : i + 1]) for i in range(len(inputs))]
        self._run = load(request["model"], request["threads"], self._inputs[0].shape)
        self._next = 0

    def block(self, seconds: float) -> np.ndarray:
        """Run for at least `seconds` and at least once: each run's time in milliseconds, float64 [runs]."""
        samples = []
        clock = time.perf_counter_ns
        run = self._run
        end = clock() + int(seconds * 1e9)
        while True:
            image = self._inputs[self._next]
            self._next = (self._next + 1) % len(self._inputs)
            start = clock()
            run(image)
            stop = clock()
            samples.append(stop - start)
            if stop >= end:
                return np.array(samples, dtype=np.float64) / 1e6


def _answer(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


if __name__ == "__main__":
    main()
