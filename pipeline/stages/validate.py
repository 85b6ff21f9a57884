"""validate: accuracy of the very files that ship, through ONNX Runtime, on test; then the manifest."""

from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...export.artifact import ShippedFile, write_manifest
from ...export.onnx_export import OnnxFile
from ...export.runtime import Classifier
from ...models.pretrained import is_free
from .. import calibration, evaluate
from ..evaluate import agreement
from ..examples import examples, said
from ..job import Job
from ..multi_label import thresholds_of
from ..results import Subject
from ..run_folder import Done
from ..scores import Calibration, Score
from ..shipped import shipped_logits
from .export import ARTIFACT, STUDENT_ONNX, origin, takes_pixels
from .quantize import STUDENT_INT8
from .teacher import ANSWERS

MANIFEST = ARTIFACT / "manifest.json"


def run(job: Job) -> Done:
    pixels, labels_, decoded = job.rendered("test", job.student)
    images, labels = pixels.numpy(), labels_.numpy()
    teacher = _teacher(job)
    files = {"student": job.folder.path / STUDENT_ONNX, "student_int8": job.folder.path / STUDENT_INT8}
    answers = {key: shipped_logits(job, file, images) for key, file in files.items()}
    int8, classes = answers["student_int8"], job.data.classes
    # Those that the file itself names; its own and the teacher's, None where images have one label.
    thresholds = Classifier(files["student_int8"].read_bytes(), files["student_int8"].name).thresholds
    of_teacher = thresholds_of(Subject.model_validate(job.folder.facts()["teacher"]))
    measured = {
        key: evaluate.measured(logits, labels, classes, thresholds)
        | ({} if teacher is None else {"agreement": agreement(logits, teacher, thresholds, of_teacher)})
        for key, logits in answers.items()
    }
    subjects = {key: Subject(name="", weights="", **found) for key, found in measured.items()}
    facts: dict[str, Any] = {
        key: subject.model_dump(include=set(measured[key]), exclude_none=True)
        for key, subject in subjects.items()
    }
    _calibrate(job, facts, answers, labels)
    if not job.data.multi_label:
        facts["confusion"] = evaluate.confusion(int8, labels)
    said_by_teacher = None if teacher is None else said(teacher, classes, of_teacher)
    said_by_student = said(int8, classes, thresholds)
    facts["examples"] = [
        one.model_dump()
        for one in examples(decoded.images, images, labels, classes, said_by_teacher, said_by_student)
    ]
    scores = {key: subject.score for key, subject in subjects.items() if subject.score is not None}
    _warn(job, scores["student"])
    _write_manifest(job, scores, thresholds)
    alike = subjects["student_int8"].agreement
    told = f"; int8 answers like the teacher on {alike.top1:.1f} %" if alike else ""
    low, high = scores["student_int8"].low, scores["student_int8"].high
    return Done(
        f"of {len(labels)} test images: fp32 {scores['student'].told}, int8 {scores['student_int8'].told} "
        f"({low:.1f} to {high:.1f}){told}",
        [MANIFEST.as_posix()],
        facts,
    )


def _teacher(job: Job) -> np.ndarray | None:
    """The teacher's answers on the test role, or the ensemble's: logits or probabilities [n,classes]; None
    where no teacher has a head.
    """
    stored = load_file(job.folder.path / ANSWERS)
    answers = [stored[t] for t in sorted(stored, key=int)]
    return calibration.together(answers, multilabel=job.data.multi_label) if answers else None


def _calibrate(job: Job, facts: dict[str, Any], answers: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Measure how honest each network's probabilities are: the teachers', and the shipped files'."""
    stored = load_file(job.folder.path / ANSWERS)
    each = [stored.get(str(t)) for t in range(len(job.folder.facts()["teachers"]))]
    found = [None if logits is None else calibration.measure(logits, labels) for logits in each]
    facts["teachers"] = [_part(one) for one in found]
    known = [logits for logits in each if logits is not None]
    if len(each) == 1:
        facts["teacher"] = _part(found[0])
    elif known:
        logits = calibration.together(known, multilabel=job.data.multi_label)
        facts["teacher"] = _part(calibration.measure(logits, labels))
    temperature = _temperature(job)
    for key, logits in answers.items():
        facts[key] |= _part(calibration.measure(logits, labels, temperature))


def _part(found: Calibration | None) -> dict[str, Any]:
    return {} if found is None else {"calibration": found.model_dump(exclude_none=True)}


def _temperature(job: Job) -> float | None:
    """What the exported files' logits were divided by, if anything."""
    value: float | None = job.folder.facts().get("temperature", {}).get("value")
    return value


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
        origin=origin(job, _temperature(job)),
        thresholds=None if thresholds is None else thresholds.tolist(),
        takes_pixels=takes_pixels(job),
    )
