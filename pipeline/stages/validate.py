"""validate: measure the accuracy of the files that ship, in ONNX Runtime on test, and write the manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...export.artifact import LABELS, ShippedFile, write_manifest
from ...export.conversion.onnx_export import describe
from ...export.device.self_test import SELF_TEST
from ...export.int8.quantizer import read_recipe
from ...export.int8.targets import is_exact_here
from ...export.runtime import Model, open_content
from ...models.catalog import is_free
from ..data.training_data import TrainingData
from ..evaluation.predictions import choose_examples, compute_onnx_logits, make_example
from ..runs import artifacts
from ..runs.folder import ARTIFACT, StageResult
from ..runs.results import SHIPPING_ORDER, Int8Search, Subject
from ..runs.scores import Calibration, Score
from ..tasks.base import Outputs, Task
from ..training.context import RunContext
from .export import STUDENT_ONNX, origin
from .formats import Source, describe_formats, write_formats
from .teacher import LOGITS

MANIFEST = ARTIFACT / "manifest.json"


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    task, folder, classes = context.task, context.folder.path, data.classes
    rendered, targets, decoded = data.rendered("test", context.student)
    pixels, labels = rendered.numpy(), targets.numpy()
    int8, first_target = _int8_files(previous), context.options.target[0]
    shipped = folder / int8.get(first_target, STUDENT_ONNX)
    model = open_content(shipped.read_bytes(), shipped.name)
    thresholds = model.thresholds
    logits = {"student": compute_onnx_logits(folder / STUDENT_ONNX, pixels, context.progress)}
    scores = {"student": task.score(logits["student"], labels, classes, thresholds)}
    target_scores: dict[str, Score] = {}
    sources = [Source(STUDENT_ONNX, None, Outputs(logits["student"], labels, thresholds))]
    for target, file in int8.items():
        values = compute_onnx_logits(folder / file, pixels, context.progress, fuse=is_exact_here(target))
        target_scores[target] = task.score(values, labels, classes, thresholds)
        sources.append(Source(file, target, Outputs(values, labels, thresholds)))
        if target == first_target:
            logits["student_int8"], scores["student_int8"] = values, target_scores[target]
    ships = next(key for key in SHIPPING_ORDER if key in logits)

    teacher_thresholds = Subject.model_validate(previous["teacher"]).thresholds
    saved = load_file(folder / LOGITS)  # of the teachers with a head
    teachers = [saved.get(str(t)) for t in range(len(previous["teachers"]))]
    teacher = task.ensemble(list(saved.values())) if saved else None

    temperature = previous.get("temperature", {}).get("value")
    facts: dict[str, Any] = _teacher_calibration(task, teachers, teacher, labels)
    for key, values in logits.items():
        measured = task.measure_calibration(values, labels, temperature)
        facts[key] = {"score": scores[key].model_dump(exclude_none=True), **_calibration_facts(measured)}
        if teacher is not None:
            own, other = Outputs(values, labels, thresholds), Outputs(teacher, labels, teacher_thresholds)
            facts[key]["agreement"] = task.agreement(own, other).model_dump()
    confusion = task.confusion(logits[ships], labels)
    if confusion is not None:
        facts["confusion"] = confusion
    student = task.judge(Outputs(logits[ships], labels, thresholds), classes)
    by_teacher = None
    if teacher is not None:
        by_teacher = task.judge(Outputs(teacher, labels, teacher_thresholds), classes)
    texts = task.describe(labels, classes)
    facts["examples"] = [
        make_example(
            decoded.images[i],
            texts[i],
            student[i],
            None if by_teacher is None else by_teacher[i],
            task.draw(pixels[i], labels[i], logits[ships][i], classes),
            task.example_side,
        ).model_dump()
        for i in choose_examples(student)
    ]
    facts["int8"] = [
        {"test_score": target_scores[target].model_dump(exclude_none=True)} if target in int8 else {}
        for target in context.options.target
    ]
    outputs = [MANIFEST.as_posix(), *((ARTIFACT / name).as_posix() for name in (SELF_TEST, LABELS))]
    if scores["student"].correct is not None:
        artifacts.write_predictions(folder / artifacts.PREDICTIONS_FILE, decoded.keys.numpy(), labels, logits)
        outputs.append(artifacts.PREDICTIONS_FILE)
    _warn(context, previous, scores["student"], labels)
    if (measured := facts[ships].get("calibration")) is not None and measured.get("before") is not None:
        _check_calibration(context, measured["before"]["ece"], measured["ece"])
    further = write_formats(context, pixels, sources)
    outputs += [(ARTIFACT / file.file.path.name).as_posix() for file in further]
    _write_manifest(context, data, previous, scores["student"], target_scores, model, further)
    score = scores[ships]
    summary = f"on {len(labels)} test images: fp32 {scores['student'].text}"
    if ships == "student_int8":
        summary += f", int8 {score.text}"
    summary += f" ({score.low:.1f} to {score.high:.1f})"
    if teacher is not None:
        summary += f"; same prediction as the teacher on {facts[ships]['agreement']['percent']:.1f} %"
    return StageResult(f"{summary}{describe_formats(further)}", outputs, facts)


def _int8_files(previous: Mapping[str, Any]) -> dict[str, Path]:
    """Return the int8 files that ship, as paths in the run folder by target."""
    searches = (Int8Search.model_validate(search) for search in previous["int8"])
    return {search.target: Path(search.file) for search in searches if search.file is not None}


def _teacher_calibration(
    task: Task, teachers: list[np.ndarray | None], ensemble: np.ndarray | None, labels: np.ndarray
) -> dict[str, Any]:
    """Return the calibration of each teacher and of their ensemble, as parts of the report."""
    measured = [None if logits is None else task.measure_calibration(logits, labels) for logits in teachers]
    facts: dict[str, Any] = {"teachers": [_calibration_facts(teacher) for teacher in measured]}
    if len(teachers) == 1:
        facts["teacher"] = _calibration_facts(measured[0])
    elif ensemble is not None:
        facts["teacher"] = _calibration_facts(task.measure_calibration(ensemble, labels))
    return facts


def _calibration_facts(measured: Calibration | None) -> dict[str, Any]:
    return {} if measured is None else {"calibration": measured.model_dump(exclude_none=True)}


def _check_calibration(context: RunContext, before: float, after: float) -> None:
    """Warn if the temperature fitted on val increased the expected calibration error on test, in percent."""
    if round(after, 1) > round(before, 1):
        context.display.warn(
            f"--calibrate made the calibration on the test images worse: the ECE was {before:.1f} %, and is "
            f"{after:.1f} %. The val images may be unlike those of test. Export without --calibrate, or use "
            "val images like those of test"
        )


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
    model: Model,
    further: Sequence[ShippedFile],
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
        files=[*int8, fp32, *further],
        preprocessing=context.student.preprocessing,
        labels=data.classes,
        origin=origin(context, previous, previous.get("temperature", {}).get("value")),
        thresholds=None if model.thresholds is None else model.thresholds.tolist(),
        decoder=model.decoder,
        takes_pixels=context.has_pixel_input,
    )
