"""validate: accuracy of the very files that ship, through ONNX Runtime, on test; then the manifest."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from safetensors.numpy import load_file

from ...export.artifact import ShippedFile, write_manifest
from ...export.onnx_export import OnnxFile
from ...export.runtime import softmax
from ...models.pretrained import is_free
from .. import calibration, evaluate
from ..job import Job
from ..results import Calibration, Example
from ..run_folder import Done
from ..shipped import shipped_logits
from .export import ARTIFACT, STUDENT_ONNX, origin
from .quantize import STUDENT_INT8
from .teacher import ANSWERS

EXAMPLES = 12
MANIFEST = ARTIFACT / "manifest.json"


def run(job: Job) -> Done:
    pixels, labels_, decoded = job.rendered("test", job.student)
    images, labels = pixels.numpy(), labels_.numpy()
    teacher = _teacher(job)
    answers = {
        key: shipped_logits(job, job.folder.path / file, images)
        for key, file in (("student", STUDENT_ONNX), ("student_int8", STUDENT_INT8))
    }
    facts: dict[str, Any] = {
        key: {
            "accuracy": evaluate.accuracy(logits, labels).model_dump(exclude_none=True),
            **_agreement(logits, teacher),
            "per_class": [c.model_dump() for c in evaluate.per_class(logits, labels, job.data.classes)],
        }
        for key, logits in answers.items()
    }
    _calibrate(job, facts, answers, labels)
    facts["confusion"] = evaluate.confusion(answers["student_int8"], labels)
    facts["examples"] = [
        e.model_dump()
        for e in _examples(job, decoded.images, images, labels, teacher, answers["student_int8"])
    ]
    _warn(job, facts)
    _write_manifest(job, facts)
    fp32, int8 = (facts[key]["accuracy"] for key in ("student", "student_int8"))
    alike = facts["student_int8"].get("agreement")
    told = f"; int8 answers like the teacher on {alike['top1']:.1f} %" if alike else ""
    return Done(
        f"of {len(labels)} test images: fp32 {fp32['top1']:.2f} %, int8 {int8['top1']:.2f} % "
        f"({int8['low']:.1f} to {int8['high']:.1f}){told}",
        [MANIFEST.as_posix()],
        facts,
    )


def _agreement(logits: np.ndarray, teacher: np.ndarray | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    return {"agreement": evaluate.agreement(logits, teacher).model_dump(exclude_none=True)}


def _teacher(job: Job) -> np.ndarray | None:
    """The teacher's answers on the test role, or the ensemble's: logits or probabilities [n,classes]; None
    where no teacher has a head.
    """
    stored = load_file(job.folder.path / ANSWERS)
    answers = [stored[t] for t in sorted(stored, key=int)]
    return calibration.together(answers) if answers else None


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
        facts["teacher"] = _part(calibration.measure(calibration.together(known), labels))
    temperature = _temperature(job)
    for key, logits in answers.items():
        facts[key] |= _part(calibration.measure(logits, labels, temperature))


def _part(found: Calibration | None) -> dict[str, Any]:
    return {} if found is None else {"calibration": found.model_dump(exclude_none=True)}


def _temperature(job: Job) -> float | None:
    """What the exported files' logits were divided by, if anything."""
    value: float | None = job.folder.facts().get("temperature", {}).get("value")
    return value


def _examples(
    job: Job,
    entries: Any,
    images: np.ndarray,
    labels: np.ndarray,
    teacher: np.ndarray | None,
    student: np.ndarray,
) -> list[Example]:
    """A few test images: the student's most confident mistakes first, then some from all over the role."""
    p_t, p_s = None if teacher is None else softmax(teacher), softmax(student)
    wrong = np.flatnonzero(student.argmax(1) != labels)
    mistakes = wrong[np.argsort(-p_s[wrong].max(1), kind="stable")][: EXAMPLES // 2]
    spread = np.linspace(0, len(labels) - 1, min(EXAMPLES, len(labels))).astype(int)
    chosen = list(dict.fromkeys([*mistakes.tolist(), *spread.tolist()]))[:EXAMPLES]
    names = job.data.classes
    return [
        Example(
            name=entries[i].name,
            label=names[labels[i]],
            teacher=None if p_t is None else names[int(p_t[i].argmax())],
            teacher_probability=None if p_t is None else float(p_t[i].max()),
            student=names[int(p_s[i].argmax())],
            student_probability=float(p_s[i].max()),
            png=_png(images[i]),
        )
        for i in chosen
    ]


def _png(image: np.ndarray) -> str:
    side = min(128, image.shape[0])
    small = PillowImage.fromarray(image).resize((side, side), PillowImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _warn(job: Job, facts: dict[str, Any]) -> None:
    known = job.folder.facts()
    measured, student = known["teacher"].get("accuracy"), facts["student"]["accuracy"]["top1"]
    teacher = measured["top1"] if measured else None
    if job.options.method != "none" and teacher is not None and teacher <= student:
        job.display.warn(
            f"The teacher ({teacher:.2f} %) is no better than the student ended up ({student:.2f} %): "
            "a better teacher, or more --teacher-epochs, would teach more."
        )
    networks = [*known["teachers"], known["student"]]
    for name, licence in dict.fromkeys((network["name"], network.get("licence")) for network in networks):
        if licence is not None and not is_free(licence):
            job.display.warn(
                f"The pretrained weights of {name} are under {licence}, which is not a free "
                "licence: check that your use is allowed before you ship what was made from them."
            )


def _write_manifest(job: Job, facts: dict[str, Any]) -> None:
    known = job.folder.facts()

    def shipped(key: str, precision: str) -> ShippedFile:
        about = known[key]
        path = job.folder.path / about["file"]
        file = OnnxFile(path, about["bytes"], about["sha256"], about["opset"], about["ir_version"])
        accuracy = facts[key]["accuracy"]
        return ShippedFile(file, precision, accuracy, about.get("quantization"))

    write_manifest(
        job.folder.path / ARTIFACT,
        # int8 first: the file that answers where none is named.
        files=[shipped("student_int8", "int8"), shipped("student", "fp32")],
        preprocessing=job.preprocessing(job.student),
        labels=job.data.classes,
        origin=origin(job, _temperature(job)),
    )
