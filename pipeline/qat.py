"""Quantization-aware training: what it starts from, and what it hands to the quantizer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..export.bias_correction import with_all_biases
from ..export.conversion.onnx_export import write_onnx
from ..export.graph_network import with_weights
from ..export.int8.fake_quantize import FakeQuantized
from ..export.int8.quantizer import Overrides, Prepared, prepare, quantize
from ..export.int8.search import Learned
from ..export.int8.targets import Target
from ..export.ranges import Batches, calibrate_ranges
from .errors import JobError
from .runs.files import whole, write_json
from .training.job import Job

FOLDER = Path("qat")
GRAPH = FOLDER / "student.onnx"
"""The float graph with the weights it learned; it goes into the quantizer and does not ship."""

RANGES = FOLDER / "ranges.json"


def begun(fp32: Path, calibration: Batches, types: Target) -> tuple[Prepared, FakeQuantized]:
    """The graph of a float file and its fake-quantized form, with ranges by MinMax.

    Args:
        calibration: images as the file takes them.

    Raises:
        JobError: the graph has an operator that cannot be trained here.
    """
    prepared = with_all_biases(prepare(fp32))
    ranges, _ = calibrate_ranges(prepared.model, prepared.fed(calibration), "minmax", prepared.scope.op_types)
    return prepared, FakeQuantized(prepared, quantize(prepared, ranges, types), types)


def save(job: Job, prepared: Prepared, network: FakeQuantized) -> None:
    """Write the learned graph and its ranges into the run folder."""
    (job.folder.path / FOLDER).mkdir(exist_ok=True)
    with whole(job.folder.path / GRAPH) as part:
        write_onnx(with_weights(prepared.model, network), part)
    ranges = {
        name: {"scale": float(one["scale"]), "zero_point": int(one["zero_point"])}
        for name, one in network.overrides().items()
    }
    write_json(job.folder.path / RANGES, {"target": job.options.target[0], "ranges": ranges})


def recovered(run: Path, prepared: Prepared) -> tuple[str, Learned]:
    """The target that was learned for, and the graph and ranges for its search.

    Args:
        run: the run folder.
        prepared: the float graph that ships.

    Raises:
        JobError: what the stage left cannot be read.
    """
    try:
        model = onnx.load(str(run / GRAPH))
        left = json.loads((run / RANGES).read_text(encoding="utf-8"))
        target, ranges = left["target"], left["ranges"]
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"{run / FOLDER} cannot be read ({error}): say --fresh to make it anew.") from error
    return target, Learned(replace(prepared, model=model), _overrides(ranges, target))


def _overrides(ranges: dict[str, dict[str, Any]], target: str) -> Overrides:
    kind = np.int8 if target == "arm64" else np.uint8
    return {
        name: {
            "scale": np.array(one["scale"], np.float32),
            "zero_point": np.array(one["zero_point"], kind),
        }
        for name, one in ranges.items()
    }
