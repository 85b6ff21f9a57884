"""Latency of students before they are trained: it depends on the architecture, not on the weights."""

from collections.abc import Callable, Mapping

import numpy as np

from ...export.conversion.onnx_export import export_onnx
from ...export.files import temporary_folder
from ...export.int8.quantizer import calibrate_ranges, prepare, quantize, recipe, write_int8
from ...export.int8.targets import find_target
from ...export.latency import runner
from ...export.runtime import detect_target, height_width
from ...models.build import build
from ..config.network import NetworkSpec
from ..errors import JobError
from .latency import random_inputs
from .results import UntrainedLatency

SECONDS = 1.0
"""Time to measure each file."""

CALIBRATION_IMAGES = 4


def measure_untrained(
    candidates: Mapping[str, NetworkSpec],
    *,
    takes_pixels: bool,
    opset: int,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda _fraction, _step: None,
) -> list[UntrainedLatency]:
    """Measure each candidate as fp32 and int8 file with random weights, interleaved, on one thread.

    Raises:
        ExportError: a candidate cannot be exported, quantized or timed.
        JobError: other processes disturbed the measurement too much.
    """
    types = find_target(detect_target())
    subjects = []
    with temporary_folder() as folder:
        for i, (name, spec) in enumerate(candidates.items()):
            progress(0.0, f"exporting {name}")
            network = build(
                spec.name,
                num_classes=spec.classes,
                image_size=spec.image_size,
                seed=seed,
                activation=spec.activation,
            )
            fp32, int8 = folder / f"{i}.onnx", folder / f"{i}.int8.onnx"
            pixels = spec.preprocessing if takes_pixels else None
            export_onnx(network.eval(), fp32, spec.image_size, metadata={}, pixels=pixels, opset=opset)
            sides = height_width(spec.image_size)
            shape, kind = ((*sides, 3), np.uint8) if takes_pixels else ((3, *sides), np.float32)
            inputs = random_inputs(shape, np.dtype(kind), seed)
            prepared = prepare(fp32)
            feed = prepared.fed([inputs[:CALIBRATION_IMAGES]])
            ranges, n = calibrate_ranges(prepared.model, feed, "minmax", prepared.scope.op_types)
            made_by = recipe(prepared, types, {"method": "minmax", "n": n})
            write_int8(prepared, quantize(prepared, ranges, types), int8, made_by)
            subjects += [runner.Subject(f"{name} {file.name}", file, inputs) for file in (fp32, int8)]
        times = runner.bench(subjects, threads=[1], seconds=seconds, seed=seed, progress=progress)

    def read(subject: runner.Subject) -> float:
        measured = times.latency(subject.name, 1)
        value = measured.p50 or measured.processor_ms
        if value is None:
            raise JobError(
                "--max-latency: the latency of the students cannot be measured, as other processes use the "
                "cores. Run the same command again when they are idle."
            )
        return value

    return [
        UntrainedLatency(candidate=name, fp32=read(fp32), int8=read(int8))
        for name, fp32, int8 in zip(candidates, subjects[::2], subjects[1::2], strict=True)
    ]
