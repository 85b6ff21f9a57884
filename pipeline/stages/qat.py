"""qat: the student learns on as the int8 network it will be, by the same method from the same teacher.

The exported graph is trained, with its batch norm folded and rewritten as it will be quantized; every
rounding stands where ONNX Runtime's quantizer puts it. Weights and ranges learn together (see
``export/int8/fake_quantize.py``), and the quantizer gets both. Weights of 8 bits are fine-tuned by a fraction of
the student's learning rate (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3).
"""

from pathlib import Path

import numpy as np
import torch

from ...export.int8 import targets
from ...export.runtime import normalise
from .. import qat
from ..data.dataset import Role
from ..data.render import Normalise
from ..evaluation import metrics
from ..heads import load_embed, load_heads
from ..int8_results import Recovery
from ..report.format import counted
from ..runs.device import Engine, threads, use_threads
from ..runs.folder import Done
from ..store.of_run import schedule_of
from ..trained import trained_network
from ..training.job import Job
from ..training.quantized import QuantizedReadouts, normalise_for
from ..training.student import reads_of, student_task
from ..training.task import DistillationTask
from ..training.trainer import engine, learn, plan
from .calibration_images import calibration_batches, calibration_images
from .export import STUDENT_ONNX
from .student import HEADS

LOOKED_AT = 4
"""Images by which readouts are found in the graph."""


def run(job: Job) -> Done:
    o = job.options
    assert o.qat_epochs and o.qat_lr
    member = job.student
    preprocessing = job.preprocessing(member)
    calibration = calibration_images(job)
    pixels = calibration.pixels[:LOOKED_AT]
    images = normalise(pixels, preprocessing)
    types = targets.target(o.target[0])
    fp32 = job.folder.path / STUDENT_ONNX
    prepared, network = qat.begun(fp32, calibration_batches(job, calibration), types)
    geometry = job.geometry(member)
    given = normalise_for(prepared.front, Normalise(geometry.mean, geometry.std))
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
    qat.save(job, prepared, network)
    found = Recovery(
        epochs=o.qat_epochs,
        fake_select=_accuracy(job, task, "select"),
        fake_test=_accuracy(job, task, "test"),
        file=qat.GRAPH.as_posix(),
    )
    on = ""
    if found.fake_select is not None:
        kind, of = ("mAP ", "on") if job.data.multi_label else ("", "of")
        on = f": {kind}{found.fake_select:.2f} % {of} the select images as int8"
    return Done(
        f"{member.name}, {counted(o.qat_epochs, 'epoch')} under fake quantization by {o.method}{on}",
        [qat.GRAPH.as_posix(), qat.RANGES.as_posix()],
        {"recovery": found.model_dump(exclude_none=True)},
    )


def _heads(job: Job) -> Path | None:
    """The heads that the student has learned with; None where its methods have none."""
    if job.options.method == "none":
        return None
    return job.folder.path / HEADS


def _accuracy(job: Job, task: DistillationTask, role: Role) -> float | None:
    """Top-1 or mAP of the fake-quantized network in torch, percent."""
    pixels, labels, _ = job.rendered(role, job.student)
    if not len(labels):
        return None
    exact = Engine("cpu", threads(), "fp32")
    network, given = task.network.cpu(), task.trainee.normalise.cpu()
    answers: np.ndarray = metrics.logits(network, given, pixels, exact).numpy()
    return metrics.percent(answers, labels.numpy())
