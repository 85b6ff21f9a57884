"""One network in a process of its own, timed on request: `python -m questpress.export.latency.bench_worker`.

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

from .. import runtime

Run = Callable[[np.ndarray], object]
"""Answers one batch, float32 [B, 3, S, S] or uint8 [B, S, S, 3]."""

Block = Callable[[dict[str, Any]], np.ndarray]
"""Answers a request for a block of runs: float64, milliseconds."""


def main() -> None:
    """Time model files in ONNX Runtime, with the options they ship with."""
    serve(in_onnxruntime, any_batch=True)


def in_onnxruntime(model: str, threads: int, _shape: tuple[int, ...]) -> Run:
    session = runtime.session(model, threads)
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def serve(load: Callable[[str, int, tuple[int, ...]], Run], *, any_batch: bool = False) -> None:
    """Serve until stdin ends, which it does when the parent is gone.

    `load` opens a model file for so many threads and inputs of one shape, [B, 3, S, S] or [B, S, S, 3], in
    the runtime that is timed; with `any_batch` what it gives takes every B, and is opened once.
    """
    answer_requests(lambda request: Subject(load, request, any_batch=any_batch).block)


def answer_requests(make: Callable[[dict[str, Any]], Block]) -> None:
    """The loop of every worker: the first request says what is timed, each further one asks for a block."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    requests = sys.stdin.buffer
    try:
        first = json.loads(requests.readline())
        if first.get("cores"):
            os.sched_setaffinity(0, first["cores"])  # before the runtime starts threads, which inherit it
        block = make(first)
        _answer(answers, {"ready": True, "cpu": time.process_time()})
        gc.disable()
        while line := requests.readline():
            samples = block(json.loads(line))
            _answer(answers, {"bytes": samples.nbytes, "cpu": time.process_time()}, samples.tobytes())
    except Exception as error:  # told to the parent, which raises it
        _answer(answers, {"error": " ".join(f"{type(error).__name__}: {error}".split())})


class Subject:
    """A model file and the inputs it is timed on, in turn."""

    def __init__(
        self,
        load: Callable[[str, int, tuple[int, ...]], Run],
        request: dict[str, Any],
        *,
        any_batch: bool = False,
    ) -> None:
        self._load, self._any_batch, self._request = load, any_batch, request
        self._given = np.load(request["inputs"])
        self._batch = 0
        self._turn(1)

    def _turn(self, batch: int) -> None:
        """Make ready for batches of another size: each begins where the one before ended."""
        if batch == self._batch:
            return
        count = max(1, len(self._given) // batch)
        chosen = np.arange(count * batch).reshape(count, batch) % len(self._given)
        self._inputs = [np.ascontiguousarray(self._given[rows]) for rows in chosen]
        self._next = 0
        if not self._batch or not self._any_batch:
            shape = self._inputs[0].shape
            self._run = self._load(self._request["model"], self._request["threads"], shape)
        self._batch = batch

    def block(self, request: dict[str, Any]) -> np.ndarray:
        """Run for at least `seconds` and at least once: each run's time in milliseconds, float64 [runs]."""
        self._turn(request.get("batch", 1))
        samples = []
        clock = time.perf_counter_ns
        run = self._run
        end = clock() + int(request["seconds"] * 1e9)
        while True:
            images = self._inputs[self._next]
            self._next = (self._next + 1) % len(self._inputs)
            start = clock()
            run(images)
            stop = clock()
            samples.append(stop - start)
            if stop >= end:
                return np.array(samples, dtype=np.float64) / 1e6


def _answer(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


if __name__ == "__main__":
    main()
