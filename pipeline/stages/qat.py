"""qat: train the student as the int8 network that it will be, by the same method from the same teacher.

The exported graph is trained, with its batch norm folded and rewritten as it will be quantized. Fake
quantization is placed as by ONNX Runtime's quantizer. Weights and ranges are trained together (see
``export/int8/fake_quantize.py``) and passed to the quantizer. The learning rate is a fraction of the
student's (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ...export.conversion.onnx_export import write_onnx
from ...export.conversion.pixel_input import Folded
from ...export.int8 import targets
from ...export.int8.correction import with_all_biases
from ...export.int8.fake_quantize import FakeQuantized
from ...export.int8.quantizer import Batches, Overrides, Prepared, calibrate_ranges, prepare, quantize
from ...export.int8.search import Learned
from ...export.int8.targets import Target
from ...export.int8.torch_graph import with_weights
from ...export.runtime import Preprocessing, normalize
from ..config.network import NetworkSpec
from ..data.dataset import Split
from ..data.decode import render_images
from ..data.render import Normalize
from ..data.training_data import TrainingData
from ..data.views import draw_order
from ..errors import JobError
from ..evaluation.predictions import compute_logits
from ..report.format import plural
from ..runs.device import Engine, threads, use_threads
from ..runs.files import atomic_write, write_json
from ..runs.folder import StageResult
from ..runs.hashes import digest
from ..runs.results import Recovery
from ..training.context import RunContext
from ..training.student import (
    HEADS,
    PixelsToGraph,
    QuantizedReadouts,
    build_methods,
    load_heads,
    load_projection,
    student_reads,
    student_task,
    view_schedule,
)
from ..training.task import DistillationTask
from ..training.trainer import build_plan, choose_run_engine, run_training
from ..training.weights import load_network
from .export import STUDENT_ONNX

FOLDER = Path("qat")
GRAPH = FOLDER / "student.onnx"
"""The float graph with the trained weights: input of the quantizer, not shipped."""

RANGES = FOLDER / "ranges.json"

MATCH_IMAGES = 4
"""Images on which features are matched to tensors of the graph."""

CALIBRATION_BATCH = 16


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    o, student, folder = context.options, context.student, context.folder.path
    assert o.qat_epochs and o.qat_lr
    calibration = draw_calibration_images(data, student)
    prepared, graph = fake_quantize(
        folder / STUDENT_ONNX,
        calibration.batches(pixel_input=context.has_pixel_input),
        targets.find_target(o.target[0]),
    )
    normalization: torch.nn.Module = Normalize(student.geometry.mean, student.geometry.std)
    if isinstance(prepared.front, Folded):
        normalization = PixelsToGraph(prepared.front)
    pixels = calibration.pixels[:MATCH_IMAGES]
    built = build_methods(o, context.round, folder)
    readouts = QuantizedReadouts(
        graph,
        load_network(folder, student),
        torch.from_numpy(normalize(pixels, student.preprocessing)),
        normalization(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
        student_reads(built),
    )
    if built:
        readouts.projection = load_projection(folder / HEADS)
    # bf16 is too coarse for ranges.
    engine = choose_run_engine(
        context, "qat", lambda precision: Engine(context.device, threads(), precision), precision="fp32"
    )
    use_threads(engine.threads)
    task, cache = student_task(context, data, readouts, engine, built, normalize=normalization)
    if built:
        load_heads(task, folder / HEADS)
    seed = context.round.seed
    plan = build_plan(
        context,
        data,
        epochs=o.qat_epochs,
        lr=o.qat_lr,
        warmup_epochs=0.0,
        seed=seed,
        unlabeled_ratio=o.unlabeled_ratio or 0.0,
    )
    run_training(
        context,
        data,
        task,
        plan,
        training="qat",
        spec=student,
        schedule=view_schedule(o, data.policy, seed),
        cache=cache,
        search_engine=False,
    )
    graph.cpu().eval()
    _save_graph(folder, prepared, graph, o.target[0])
    recovery = Recovery(
        epochs=o.qat_epochs,
        fake_val=_percent(context, data, task, "val"),
        fake_test=_percent(context, data, task, "test"),
        file=GRAPH.as_posix(),
    )
    accuracy = ""
    if recovery.fake_val is not None:
        accuracy = f": {context.task.metric} {recovery.fake_val:.2f} % on the val images as int8"
    return StageResult(
        f"{student.name}, {plural(o.qat_epochs, 'epoch')} of QAT by {o.method}{accuracy}",
        [GRAPH.as_posix(), RANGES.as_posix()],
        {"recovery": recovery.model_dump(exclude_none=True)},
    )


def fake_quantize(fp32: Path, calibration: Batches, types: Target) -> tuple[Prepared, FakeQuantized]:
    """Return the graph of a float file and its fake-quantized form, with MinMax ranges."""
    prepared = with_all_biases(prepare(fp32))
    ranges, _ = calibrate_ranges(prepared.model, prepared.fed(calibration), "minmax", prepared.scope.op_types)
    return prepared, FakeQuantized(prepared, quantize(prepared, ranges, types), types)


def _save_graph(run: Path, prepared: Prepared, graph: FakeQuantized, target: str) -> None:
    """Write the trained graph and its ranges into the run folder."""
    (run / FOLDER).mkdir(exist_ok=True)
    with atomic_write(run / GRAPH) as part:
        write_onnx(with_weights(prepared.model, graph), part)
    ranges = {
        name: {"scale": float(override["scale"]), "zero_point": int(override["zero_point"])}
        for name, override in graph.overrides().items()
    }
    write_json(run / RANGES, {"target": target, "ranges": ranges})


def load_graph(run: Path, prepared: Prepared) -> tuple[str, Learned]:
    """Return the target for which QAT has trained, and the graph and ranges for its search."""
    try:
        model = onnx.load(str(run / GRAPH))
        content = json.loads((run / RANGES).read_text(encoding="utf-8"))
        target, ranges = content["target"], content["ranges"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise JobError(f"{run / FOLDER} cannot be read ({error}). Use --fresh to recompute it.") from error
    dtypes = {"scale": np.float32, "zero_point": np.int8 if target == "arm64" else np.uint8}
    overrides: Overrides = {
        name: {key: np.array(range_[key], dtype) for key, dtype in dtypes.items()}
        for name, range_ in ranges.items()
    }
    return target, Learned(replace(prepared, model=model), overrides)


def _percent(context: RunContext, data: TrainingData, task: DistillationTask, split: Split) -> float | None:
    """Return the score of the fake-quantized network in torch, in percent."""
    pixels, labels, _ = data.rendered(split, context.student)
    if not len(labels):
        return None
    logits = compute_logits(
        task.network.cpu(), task.student.normalize.cpu(), pixels, Engine("cpu", threads(), "fp32")
    )
    return context.task.percent(logits.numpy(), labels.numpy())


@dataclass(frozen=True)
class CalibrationImages:
    """Rendered images."""

    pixels: np.ndarray
    """uint8 [n,H,W,3]."""
    labels: np.ndarray
    preprocessing: Preprocessing
    hash: str
    """Hash of the set of images, independent of their order."""

    def batches(self, *, pixel_input: bool) -> Callable[[], Iterator[np.ndarray]]:
        """Return a function that yields batches of a file's input: uint8 pixels, or normalized images."""

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, len(self.pixels), CALIBRATION_BATCH):
                pixels = self.pixels[start : start + CALIBRATION_BATCH]
                yield pixels if pixel_input else normalize(pixels, self.preprocessing)

        return batches


def draw_calibration_images(data: TrainingData, student: NetworkSpec) -> CalibrationImages:
    """Draw ``--calibration-images`` labeled images; all if there are fewer."""
    o, labeled = data.options, data.train.labeled
    order = draw_order(o.seed, 0, data.train.keys[: len(labeled)])[: o.calibration_images].tolist()
    images = [labeled[i] for i in order]
    decoded = data.check_kept(images, render_images(images, student.preprocessing))
    return CalibrationImages(
        decoded.pixels.stack().numpy(),
        decoded.targets(data.dataset).numpy(),
        student.preprocessing,
        digest(sorted(image.key for image in images)),
    )
