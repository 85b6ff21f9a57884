"""The range of every activation over calibration images, by ONNX Runtime's calibrators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, calibrate
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator

from . import runtime
from .errors import CalibratorError, ExportError
from .files import scratch

log = logging.getLogger(__name__)

METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    # Of chunks of 8 images: the mean over about the last twenty of them.
    "moving-average": (CalibrationMethod.MinMax, {"moving_average": True, "averaging_constant": 0.05}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"symmetric": False, "percentile": 99.99}),
}
"""ONNX Runtime has a fourth, Distribution, whose ranges are of no use (−0.8 dB of signal to noise)."""

CHUNK = 8
"""Images at once: histograms hold every activation of a chunk in memory."""

Batches = Callable[[], Iterable[np.ndarray]] | Sequence[np.ndarray]
"""Preprocessed images, float32 [b, 3, S, S] each."""


def calibrate_ranges(
    model: onnx.ModelProto, calibration: Batches, method: str, op_types: Sequence[str]
) -> tuple[TensorsData, int]:
    """The range of every activation beside an operator of `op_types`, and how many images it was taken from.

    Images go through in chunks whose ranges and histograms are merged, so that memory does not grow with
    their number. Raises CalibratorError where this method cannot cope with the activations, ExportError for
    an unknown method, where there is no image, and where an image or an activation isn't finite.
    """
    if method not in METHODS:
        raise ExportError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    kind, options = METHODS[method]
    input_name = model.graph.input[0].name
    n = 0
    with scratch() as folder, quiet():
        path = folder / "float.onnx"
        onnx.save(model, str(path))
        augmented = folder / "augmented.onnx"
        calibrator = create_calibrator(
            path, list(op_types), str(augmented), calibrate_method=kind, extra_options=dict(options)
        )
        calibrator.infer_session = _session(augmented)
        try:
            for chunk in chunks(calibration):
                if not np.isfinite(chunk).all():
                    raise ExportError("calibration images hold values that are not finite numbers")
                calibrator.collect_data(_One({input_name: chunk}))
                n += len(chunk)
            if n == 0:
                raise ExportError("int8 needs calibration images, and there are none")
            ranges = calibrator.compute_data()
        except MemoryError as error:  # a histogram's bins are as wide as the first chunk's
            raise CalibratorError(
                f"the calibrator {method} needs more memory than there is: activations of later images are "
                "far larger than those of the first; minmax does not count them"
            ) from error
        del calibrator
    for name, tensor in ranges.items():
        low, high = tensor.range_value[:2]
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ExportError(
                f"the network's activations on the calibration images are not finite ({name} ranges from "
                f"{np.min(low)} to {np.max(high)}): it cannot be quantized"
            )
    return ranges, n


def chunks(calibration: Batches) -> Iterator[np.ndarray]:
    """Calibration images as float32 arrays of at most `CHUNK`."""
    for batch in calibration() if callable(calibration) else calibration:
        for start in range(0, len(batch), CHUNK):
            yield np.ascontiguousarray(batch[start : start + CHUNK], dtype=np.float32)


class _One(CalibrationDataReader):
    """One batch, once: ONNX Runtime's calibrators merge what they see from call to call."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self._feed = self._feed, None
        return feed


def _session(path: Path) -> ort.InferenceSession:
    """As the calibrator's own, which would start a thread for each core of the host, allowed or not."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = runtime.default_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ONNX Runtime's tools' prints and their use of the root logger away from the terminal."""
    root = logging.getLogger()
    nothing = logging.NullHandler()  # without a handler, logging.warning() would install one for good

    def drop(record: logging.LogRecord) -> bool:
        log.debug("quantizer: %s", record.getMessage())
        return False

    root.addHandler(nothing)
    root.addFilter(drop)  # of the root logger itself: other loggers' records don't pass here
    try:
        with patch.object(calibrate, "print", log.debug, create=True):
            yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(nothing)
