"""qat: the student learns on as the int8 network it will be, by the same method from the same teacher.

The exported graph is trained, with its batch norm folded and rewritten as it will be quantized; every
rounding stands where ONNX Runtime's quantizer puts it. Weights and ranges learn together (see
``export/int8/fake_quantize.py``), and the quantizer gets both. Weights of 8 bits are fine-tuned by a
fraction of
the student's learning rate (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ...export.conversion.onnx_export import write_onnx
from ...export.int8 import targets
from ...export.int8.correction import with_all_biases
from ...export.int8.fake_quantize import FakeQuantized
from ...export.int8.quantizer import Batches, Overrides, Prepared, calibrate_ranges, prepare, quantize
from ...export.int8.search import Learned
from ...export.int8.targets import Target
from ...export.int8.torch_graph import with_weights
from ...export.runtime import normalise
from ..data.dataset import Split
from ..data.render import Normalize
from ..errors import JobError
from ..evaluation.inference import compute_logits
from ..report.format import counted
from ..runs.device import Engine, threads, use_threads
from ..runs.files import atomic_write, write_json
from ..runs.folder import StageResult
from ..runs.results import Recovery
from ..tasks import task_of
from ..training.job import Job
from ..training.quantized import QuantizedReadouts, normalise_for
from ..training.student import load_embed, load_heads, reads_of, student_task
from ..training.task import DistillationTask
from ..training.teacher_cache import schedule_of
from ..training.trainer import engine, learn, plan
from ..training.weights import trained_network
from .calibration_images import calibration_batches, calibration_images
from .export import STUDENT_ONNX
from .student import HEADS

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
    with atomic_write(job.folder.path / GRAPH) as part:
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


LOOKED_AT = 4
"""Images by which readouts are found in the graph."""


def run(job: Job) -> StageResult:
    o = job.options
    assert o.qat_epochs and o.qat_lr
    member = job.student
    preprocessing = job.preprocessing(member)
    calibration = calibration_images(job)
    pixels = calibration.pixels[:LOOKED_AT]
    images = normalise(pixels, preprocessing)
    types = targets.target(o.target[0])
    fp32 = job.folder.path / STUDENT_ONNX
    prepared, network = begun(fp32, calibration_batches(job, calibration), types)
    geometry = job.geometry(member)
    given = normalise_for(prepared.front, Normalize(geometry.mean, geometry.std))
    looked_at = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    readouts = QuantizedReadouts(
        network,
        trained_network(job, member),
        torch.from_numpy(images),
        given(looked_at),
        reads_of(job),
    )
    heads = _heads(job)
    readouts.embed = None if heads is None else load_embed(heads)
    # Ranges are exact numbers, which bf16 is too coarse for.
    chosen = engine(job, "qat", lambda only: Engine(job.device, threads(), only), precision="fp32")
    use_threads(chosen.threads)
    task, store = student_task(job, readouts, chosen, normalise=given)
    if heads is not None:
        load_heads(task, heads)
    learning = plan(job, epochs=o.qat_epochs, lr=o.qat_lr, warmup_epochs=0.0, seed=job.seed)
    learn(
        job,
        task,
        learning,
        what="qat",
        member=member,
        views_of=schedule_of(job),
        store=store,
        race=False,
    )
    network.cpu().eval()
    save(job, prepared, network)
    found = Recovery(
        epochs=o.qat_epochs,
        fake_select=_accuracy(job, task, "val"),
        fake_test=_accuracy(job, task, "test"),
        file=GRAPH.as_posix(),
    )
    on = ""
    if found.fake_select is not None:
        on = f": {task_of(job.data).metric} {found.fake_select:.2f} % on the val images as int8"
    return StageResult(
        f"{member.name}, {counted(o.qat_epochs, 'epoch')} under fake quantization by {o.method}{on}",
        [GRAPH.as_posix(), RANGES.as_posix()],
        {"recovery": found.model_dump(exclude_none=True)},
    )


def _heads(job: Job) -> Path | None:
    """The heads that the student has learned with; None where its methods have none."""
    if job.options.method == "none":
        return None
    return job.folder.path / HEADS


def _accuracy(job: Job, task: DistillationTask, role: Split) -> float | None:
    """Top-1 or mAP of the fake-quantized network in torch, percent."""
    pixels, labels, _ = job.rendered(role, job.student)
    if not len(labels):
        return None
    exact = Engine("cpu", threads(), "fp32")
    network, given = task.network.cpu(), task.trainee.normalise.cpu()
    answers: np.ndarray = compute_logits(network, given, pixels, exact).numpy()
    return task_of(job.data).percent(answers, labels.numpy())
