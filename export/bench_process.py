"""The parent's end of a bench worker: start it, ask it, and never wait for it for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import ExportError

_LOAD_SECONDS = 300.0
_BLOCK_TIMEOUT_SECONDS = (
    120.0  # beyond the block itself: room for one run of a slow network on a busy machine
)


class Worker:
    """A process that holds one network and times it on request; ends with the `with` block.

    It is started at once, and is ready when the block is entered. `script`, a Python program and its
    arguments, serves requests as `bench_worker` does, for another runtime than ONNX Runtime. `cores` are
    those it is pinned to, if any.
    """

    def __init__(
        self,
        name: str,
        model: Path | str,
        inputs: Path,
        threads: int,
        script: Sequence[str] = (),
        cores: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.threads = threads
        self.cpu_seconds = 0.0
        """Processor time it has used, as of its last answer."""
        self._request = {
            "model": str(model),
            "inputs": str(inputs),
            "threads": threads,
            "cores": list(cores),
        }
        self._ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        # The child finds what the parent found, and nothing of the folder the user happens to be in.
        search = os.pathsep.join(entry for entry in sys.path if entry)
        served_by = script or ("-m", f"{__package__}.bench_worker")
        self._process = subprocess.Popen(
            [sys.executable, "-P", *served_by],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": search},
        )

    def ready(self) -> None:
        """Wait until it has loaded its network. Raises ExportError."""
        if not self._ready:
            self._ask(self._request, _LOAD_SECONDS)
            self._ready = True

    def block(self, seconds: float, batch: int = 1) -> np.ndarray:
        """Times of runs over at least `seconds`, float64 [runs], milliseconds; `batch` images a run. Raises
        ExportError.
        """
        return self._ask({"seconds": seconds, "batch": batch}, seconds + _BLOCK_TIMEOUT_SECONDS)

    def _ask(self, request: dict[str, Any], limit: float) -> np.ndarray:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            pipe_in.write(json.dumps(request).encode() + b"\n")
            pipe_in.flush()
            head = json.loads(pipe_out.readline())
            body = pipe_out.read(head.get("bytes", 0))
        except (OSError, ValueError) as error:  # a broken pipe, or an answer cut short
            raise ExportError(self._obituary(overdue.is_set(), limit)) from error
        finally:
            timer.cancel()
        if "error" in head:
            told = str(head["error"]).replace(str(self._request["model"]), self.name)
            raise ExportError(f"{self.name} cannot be timed: {told}")
        if len(body) != head.get("bytes", 0):
            raise ExportError(self._obituary(overdue.is_set(), limit))
        self.cpu_seconds = head.get("cpu", self.cpu_seconds)
        return np.frombuffer(body, dtype=np.float64)

    def _obituary(self, overdue: bool, limit: float) -> str:
        if overdue:
            return f"{self.name} cannot be timed: no answer within {limit:.0f} s on {self.threads} threads"
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"{self.name} cannot be timed: its process ended with {code}" + (
            f" ({lines[-1]})" if lines else ""
        )

    def close(self) -> None:
        """End the process, kindly first."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was left to write has no reader any more
                pass
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
