"""validate: accuracy of the very files that ship, through ONNX Runtime, on test; then the manifest."""

from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...export.artifact import ShippedFile, write_manifest
from ...export.onnx_export import OnnxFile
from ...export.runtime import Classifier
from ...models.pretrained import is_free
from .. import evaluate
from ..examples import examples, said
from ..job import Job
from ..multi_label import thresholds_of
from ..results import Score, Subject
from ..run_folder import Done
from .export import ARTIFACT, STUDENT_ONNX, onnx_logits, origin
from .quantize import STUDENT_INT8
from .teacher import ANSWERS, ensemble_logits

MANIFEST = ARTIFACT / "manifest.json"


def run(job: Job) -> Done:
    pixels, labels_, decoded = job.rendered("test", job.student)
    images, labels = pixels.numpy(), labels_.numpy()
    teacher = _teacher(job)
    classifiers = {
        key: Classifier((job.folder.path / file).read_bytes(), file.name)
        for key, file in (("student", STUDENT_ONNX), ("student_int8", STUDENT_INT8))
    }
    answers = {key: onnx_logits(job, one, images) for key, one in classifiers.items()}
    thresholds = classifiers["student_int8"].thresholds
    of_teacher = thresholds_of(Subject.model_validate(job.folder.facts()["teacher"]))
    measured = {
        key: {
            **evaluate.measured(logits, labels, job.data.classes, thresholds),
            "agreement": evaluate.agreement(logits, teacher, thresholds, of_teacher),
        }
        for key, logits in answers.items()
    }
    facts: dict[str, Any] = {
        key: Subject(name="", weights="", **found).model_dump(include=set(found), exclude_none=True)
        for key, found in measured.items()
    }
    if not job.data.multi_label:
        facts["confusion"] = evaluate.confusion(answers["student_int8"], labels)
    classes = job.data.classes
    said_by = (said(teacher, classes, of_teacher), said(answers["student_int8"], classes, thresholds))
    facts["examples"] = [
        one.model_dump() for one in examples(decoded.images, images, labels, classes, *said_by)
    ]
    fp32, int8 = (
        measured[key].get("accuracy") or measured[key]["multi_label"] for key in ("student", "student_int8")
    )
    _warn(job, fp32)
    _write_manifest(job, {"student": fp32, "student_int8": int8}, thresholds)
    alike = facts["student_int8"]["agreement"]["top1"]
    return Done(
        f"of {len(labels)} test images: fp32 {fp32.told}, int8 {int8.told} "
        f"({int8.low:.1f} to {int8.high:.1f}); int8 answers like the teacher on {alike:.1f} %",
        [MANIFEST.as_posix()],
        facts,
    )


def _teacher(job: Job) -> np.ndarray:
    """The teacher's answers on the test role, or the ensemble's: logits [n,classes]."""
    stored = load_file(job.folder.path / ANSWERS)
    answers = [stored[str(t)] for t in range(len(stored))]
    return answers[0] if len(answers) == 1 else ensemble_logits(job, answers)


def _warn(job: Job, student: Score) -> None:
    known = job.folder.facts()
    teacher = Subject.model_validate(known["teacher"]).score
    if job.options.method != "none" and teacher is not None and teacher.percent <= student.percent:
        job.display.warn(
            f"The teacher ({teacher.told}) is no better than the student ended up ({student.told}): "
            "a better teacher, or more --teacher-epochs, would teach more."
        )
    networks = [*known["teachers"], known["student"]]
    for name, licence in dict.fromkeys((network["name"], network.get("licence")) for network in networks):
        if licence is not None and not is_free(licence):
            job.display.warn(
                f"The pretrained weights of {name} are under {licence}, which is not a free "
                "licence: check that your use is allowed before you ship what was made from them."
            )


def _write_manifest(job: Job, scores: dict[str, Score], thresholds: np.ndarray | None) -> None:
    known = job.folder.facts()

    def shipped(key: str, precision: str) -> ShippedFile:
        about = known[key]
        path = job.folder.path / about["file"]
        file = OnnxFile(path, about["bytes"], about["sha256"], about["opset"], about["ir_version"])
        accuracy = scores[key].model_dump(exclude_none=True, exclude={"classes"})
        return ShippedFile(file, precision, accuracy, about.get("quantization"))

    write_manifest(
        job.folder.path / ARTIFACT,
        # int8 first: the file that answers where none is named.
        files=[shipped("student_int8", "int8"), shipped("student", "fp32")],
        preprocessing=job.preprocessing(job.student),
        labels=job.data.classes,
        origin=origin(job),
        thresholds=None if thresholds is None else thresholds.tolist(),
    )
