"""validate: measure the accuracy of the files that ship, in ONNX Runtime on test, and write the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...export.artifact import ShippedFile, write_manifest
from ...export.conversion.onnx_export import describe
from ...export.int8.quantizer import read_recipe
from ...export.int8.targets import is_exact_here
from ...export.runtime import Classifier
from ...models.pretrained import is_free
from ..data.training_data import TrainingData
from ..evaluation import calibration
from ..evaluation.mistakes import choose_examples
from ..runs import predictions
from ..runs.folder import ARTIFACT, StageResult
from ..runs.results import Int8Search, Subject
from ..runs.scores import Calibration, Score
from ..tasks.base import Task
from ..training.context import RunContext
from .export import STUDENT_INT8, STUDENT_ONNX, onnx_logits, origin
from .teacher import LOGITS

MANIFEST = ARTIFACT / "manifest.json"


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    o, task, folder, classes = context.options, context.task, context.folder.path, data.classes
    pixels, labels_, decoded = data.rendered("test", context.student)
    images, labels = pixels.numpy(), labels_.numpy()
    int8 = _int8_files(previous)
    logits = {"student": onnx_logits(context, folder / STUDENT_ONNX, images)}
    ships = "student"
    if o.target[0] in int8:
        ships, fuse = "student_int8", is_exact_here(o.target[0])
        logits[ships] = onnx_logits(context, folder / STUDENT_INT8, images, fuse=fuse)
    file = folder / (STUDENT_INT8 if ships == "student_int8" else STUDENT_ONNX)
    thresholds = Classifier(file.read_bytes(), file.name).thresholds
    teacher_thresholds = Subject.model_validate(previous["teacher"]).thresholds
    teacher_logits = load_file(folder / LOGITS)  # of the teachers with a head
    teachers = [teacher_logits.get(str(t)) for t in range(len(previous["teachers"]))]
    with_head = [t for t in teachers if t is not None]
    teacher = task.likelihood.ensemble(with_head) if with_head else None
    scores = {key: task.score(values, labels, classes, thresholds) for key, values in logits.items()}
    facts: dict[str, Any] = {
        key: {"score": score.model_dump(exclude_none=True)} for key, score in scores.items()
    }
    agreement = None
    if teacher is not None:
        for key, values in logits.items():
            agreement = task.agreement(values, teacher, thresholds, teacher_thresholds)
            facts[key]["agreement"] = agreement.model_dump()
    temperature = previous.get("temperature", {}).get("value")
    for key, values in logits.items():
        measured = calibration.measure(values, labels, task.likelihood, temperature)
        facts[key] |= _calibration_facts(measured)
    facts |= _teacher_calibration(task, teachers, teacher, labels)
    confusion = task.confusion(logits[ships], labels)
    if confusion is not None:
        facts["confusion"] = confusion.tolist()
    examples = choose_examples(
        decoded.images,
        images,
        task.describe(labels, classes),
        None if teacher is None else task.decode(teacher, classes, teacher_thresholds),
        task.decode(logits[ships], classes, thresholds),
    )
    facts["examples"] = [example.model_dump() for example in examples]
    targets: dict[str, Score] = {}
    for target, path in int8.items():
        if target == o.target[0]:
            targets[target] = scores["student_int8"]
        else:
            values = onnx_logits(context, folder / path, images, fuse=is_exact_here(target))
            targets[target] = task.score(values, labels, classes, thresholds)
    facts["int8"] = [
        {"test_score": targets[target].model_dump(exclude_none=True)} if target in targets else {}
        for target in o.target
    ]
    outputs = [MANIFEST.as_posix()]
    if scores["student"].correct is not None:
        predictions.write_predictions(
            folder / predictions.PREDICTIONS_FILE, decoded.keys.numpy(), labels, logits
        )
        outputs.append(predictions.PREDICTIONS_FILE)
    _warn(context, previous, scores["student"], labels)
    _write_manifest(context, data, previous, scores["student"], targets, thresholds)
    score = scores[ships]
    int8_text = f", int8 {score.text}" if ships == "student_int8" else ""
    agreement_text = f"; same prediction as the teacher on {agreement.percent:.1f} %" if agreement else ""
    return StageResult(
        f"on {len(labels)} test images: fp32 {scores['student'].text}{int8_text} "
        f"({score.low:.1f} to {score.high:.1f}){agreement_text}",
        outputs,
        facts,
    )


def _int8_files(previous: Mapping[str, Any]) -> dict[str, Path]:
    """Return the int8 files that ship, as paths in the run folder by target."""
    searches = (Int8Search.model_validate(search) for search in previous["int8"])
    return {search.target: Path(search.file) for search in searches if search.file is not None}


def _teacher_calibration(
    task: Task, teachers: list[np.ndarray | None], ensemble: np.ndarray | None, labels: np.ndarray
) -> dict[str, Any]:
    """Return the calibration of each teacher and of their ensemble, as parts of the report."""
    measured = [
        None if logits is None else calibration.measure(logits, labels, task.likelihood)
        for logits in teachers
    ]
    facts: dict[str, Any] = {"teachers": [_calibration_facts(teacher) for teacher in measured]}
    if len(teachers) == 1:
        facts["teacher"] = _calibration_facts(measured[0])
    elif ensemble is not None:
        facts["teacher"] = _calibration_facts(calibration.measure(ensemble, labels, task.likelihood))
    return facts


def _calibration_facts(measured: Calibration | None) -> dict[str, Any]:
    return {} if measured is None else {"calibration": measured.model_dump(exclude_none=True)}


def _warn(context: RunContext, previous: Mapping[str, Any], student: Score, labels: np.ndarray) -> None:
    warn = context.display.warn
    teacher = Subject.model_validate(previous["teacher"]).score
    chance = context.task.chance(labels)
    guessing = [
        f"the {name} ({score.text})"
        for name, score in (("teacher", teacher), ("student", student))
        if score is not None and score.low <= chance.percent
    ]
    if guessing:
        text = " and ".join(guessing)
        warn(
            f"{text[0].upper()}{text[1:]} may be no better than chance ({chance.percent:.1f} %, "
            f"{chance.meaning}). Use more images or more epochs."
        )
    if context.options.method != "none" and teacher is not None and teacher.percent <= student.percent:
        warn(
            f"The teacher ({teacher.text}) is not more accurate than the student ({student.text}). "
            "Consider a stronger teacher or more --teacher-epochs."
        )
    networks = [*previous["teachers"], previous["student"]]
    for name, license in dict.fromkeys((network["name"], network.get("license")) for network in networks):
        if license is not None and not is_free(license):
            warn(
                f"The pretrained weights of {name} are under {license}, which is not a free license. "
                "Check that it permits your use; it applies to the student too."
            )


def _write_manifest(
    context: RunContext,
    data: TrainingData,
    previous: Mapping[str, Any],
    student: Score,
    targets: Mapping[str, Score],
    thresholds: np.ndarray | None,
) -> None:
    folder, accuracy = context.folder.path, context.task.manifest_entry
    int8 = [
        ShippedFile(
            describe(folder / path), "int8", accuracy(targets[target]), read_recipe(folder / path), target
        )
        for target, path in _int8_files(previous).items()
    ]
    fp32 = ShippedFile(describe(folder / previous["student"]["file"]), "fp32", accuracy(student))
    write_manifest(
        folder / ARTIFACT,
        # The first file is the default of predict.py.
        files=[*int8, fp32],
        preprocessing=context.student.preprocessing,
        labels=data.classes,
        origin=origin(context, previous, previous.get("temperature", {}).get("value")),
        thresholds=None if thresholds is None else thresholds.tolist(),
        takes_pixels=context.has_pixel_input,
    )
