"""validate: accuracy of the very files that ship, through ONNX Runtime, on test; then the manifest."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...export.artifact import ShippedFile, write_manifest
from ...export.conversion.onnx_export import OnnxFile, describe
from ...export.int8.quantizer import recipe_of
from ...export.int8.targets import right_here
from ...export.runtime import Classifier
from ...models.pretrained import is_free
from ..evaluation import calibration
from ..evaluation.examples import choose_examples
from ..runs import predictions
from ..runs.folder import StageResult
from ..runs.results import Int8Search, Subject
from ..runs.scores import Calibration, Proportion, Score
from ..tasks import task_of, thresholds_of
from ..training.job import Job, takes_pixels
from .export import ARTIFACT, STUDENT_ONNX, onnx_logits, origin
from .quantize import STUDENT_INT8
from .teacher import ANSWERS

MANIFEST = ARTIFACT / "manifest.json"


def run(job: Job) -> StageResult:
    pixels, labels_, decoded = job.rendered("test", job.student)
    images, labels = pixels.numpy(), labels_.numpy()
    task = task_of(job.data)
    teacher = _teacher(job)
    int8 = _int8(job)
    files = {"student": STUDENT_ONNX}
    if job.options.target[0] in int8:
        files["student_int8"] = STUDENT_INT8
    answers = {key: onnx_logits(job, job.folder.path / file, images) for key, file in files.items()}
    if "student_int8" in files and not right_here(job.options.target[0]):
        file = job.folder.path / STUDENT_INT8
        answers["student_int8"] = onnx_logits(job, file, images, fuse=False)
    ships = list(files)[-1]
    shipped, classes = answers[ships], job.data.classes
    # Those that the file itself names; its own and the teacher's, None where images have one label.
    file = job.folder.path / files[ships]
    thresholds = Classifier(file.read_bytes(), file.name).thresholds
    of_teacher = thresholds_of(Subject.model_validate(job.folder.facts()["teacher"]))
    scores = {key: task.score(logits, labels, classes, thresholds) for key, logits in answers.items()}
    facts: dict[str, Any] = {key: {"score": score.model_dump(exclude_none=True)} for key, score in scores.items()}
    agreements: dict[str, Proportion] = {}
    if teacher is not None:
        for key, logits in answers.items():
            agreements[key] = task.agreement(logits, teacher, thresholds, of_teacher)
            facts[key]["agreement"] = agreements[key].model_dump()
    _calibrate(job, facts, answers, labels)
    confusion = task.confusion(shipped, labels)
    if confusion is not None:
        facts["confusion"] = confusion.tolist()
    by_teacher = None if teacher is None else task.decode(teacher, classes, of_teacher)
    by_student = task.decode(shipped, classes, thresholds)
    facts["examples"] = [
        one.model_dump()
        for one in choose_examples(
            decoded.images, images, task.describe(labels, classes), by_teacher, by_student
        )
    ]
    of_targets = _of_targets(job, int8, scores.get("student_int8"), images, labels, thresholds)
    facts["int8"] = [
        {"test_score": of_targets[name].model_dump(exclude_none=True)} if name in of_targets else {}
        for name in job.options.target
    ]
    outputs = [MANIFEST.as_posix()]
    if scores["student"].correct is not None:
        predictions.write_predictions(
            job.folder.path / predictions.PREDICTIONS_FILE, decoded.keys.numpy(), labels, answers
        )
        outputs.append(predictions.PREDICTIONS_FILE)
    _warn(job, scores["student"], labels)
    _write_manifest(job, scores["student"], of_targets, thresholds)
    alike, score = agreements.get(ships), scores[ships]
    name = "int8" if ships == "student_int8" else "it"
    told = f"; {name} answers like the teacher on {alike.percent:.1f} %" if alike else ""
    both = f", int8 {score.text}" if ships == "student_int8" else ""
    return StageResult(
        f"of {len(labels)} test images: fp32 {scores['student'].text}{both} "
        f"({score.low:.1f} to {score.high:.1f}){told}",
        outputs,
        facts,
    )


def _int8(job: Job) -> dict[str, Path]:
    """The int8 files that ship, inside the run folder, by target."""
    found = (Int8Search.model_validate(one) for one in job.folder.facts()["int8"])
    return {one.target: Path(one.file) for one in found if one.file is not None}


def _of_targets(
    job: Job,
    int8: dict[str, Path],
    first: Score | None,
    images: np.ndarray,
    labels: np.ndarray,
    thresholds: np.ndarray | None,
) -> dict[str, Score]:
    """Accuracy of each target's file, as its own processor computes it."""
    scores: dict[str, Score] = {}
    for name, file in int8.items():
        if first is not None and name == job.options.target[0]:
            scores[name] = first
            continue
        logits = onnx_logits(job, job.folder.path / file, images, fuse=right_here(name))
        scores[name] = task_of(job.data).score(logits, labels, job.data.classes, thresholds)
    return scores


def _teacher(job: Job) -> np.ndarray | None:
    """The teacher's answers on the test role, or the ensemble's: logits or probabilities [n,classes]; None
    where no teacher has a head.
    """
    stored = load_file(job.folder.path / ANSWERS)
    answers = [stored[t] for t in sorted(stored, key=int)]
    return task_of(job.data).likelihood.ensemble(answers) if answers else None


def _calibrate(job: Job, facts: dict[str, Any], answers: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Measure how honest each network's probabilities are: the teachers', and the shipped files'."""
    stored = load_file(job.folder.path / ANSWERS)
    each = [stored.get(str(t)) for t in range(len(job.folder.facts()["teachers"]))]
    likelihood = task_of(job.data).likelihood
    found = [None if logits is None else calibration.measure(logits, labels, likelihood) for logits in each]
    facts["teachers"] = [_part(one) for one in found]
    known = [logits for logits in each if logits is not None]
    if len(each) == 1:
        facts["teacher"] = _part(found[0])
    elif known:
        facts["teacher"] = _part(calibration.measure(likelihood.ensemble(known), labels, likelihood))
    temperature = _temperature(job)
    for key, logits in answers.items():
        facts[key] |= _part(calibration.measure(logits, labels, likelihood, temperature))


def _part(found: Calibration | None) -> dict[str, Any]:
    return {} if found is None else {"calibration": found.model_dump(exclude_none=True)}


def _temperature(job: Job) -> float | None:
    """What the exported files' logits were divided by, if anything."""
    value: float | None = job.folder.facts().get("temperature", {}).get("value")
    return value


def _warn(job: Job, student: Score, labels: np.ndarray) -> None:
    known = job.folder.facts()
    teacher = Subject.model_validate(known["teacher"]).score
    chance = task_of(job.data).chance(labels)
    guessing = [
        f"the {who} ({score.text})"
        for who, score in (("teacher", teacher), ("student", student))
        if score is not None and score.low <= chance.percent
    ]
    if guessing:
        text = " and ".join(guessing)
        job.display.warn(
            f"{text[0].upper()}{text[1:]} may be no better than chance ({chance.percent:.1f} %, "
            f"{chance.meaning}). Use more images or more epochs."
        )
    if job.options.method != "none" and teacher is not None and teacher.percent <= student.percent:
        job.display.warn(
            f"The teacher ({teacher.text}) is not more accurate than the student ({student.text}). "
            "Consider a stronger teacher or more --teacher-epochs."
        )
    networks = [*known["teachers"], known["student"]]
    for name, licence in dict.fromkeys((network["name"], network.get("licence")) for network in networks):
        if licence is not None and not is_free(licence):
            job.display.warn(
                f"The pretrained weights of {name} are under {licence}, which is not a free "
                "licence: check that your use is allowed before you ship what was made from them."
            )


def _write_manifest(
    job: Job, student: Score, of_targets: dict[str, Score], thresholds: np.ndarray | None
) -> None:
    known = job.folder.facts()

    def described(path: Path) -> OnnxFile:
        return describe(job.folder.path / path)

    accuracy = task_of(job.data).manifest_entry

    int8 = [
        ShippedFile(
            described(path), "int8", accuracy(of_targets[name]), recipe_of(job.folder.path / path), name
        )
        for name, path in _int8(job).items()
    ]
    fp32 = ShippedFile(described(Path(known["student"]["file"])), "fp32", accuracy(student))
    write_manifest(
        job.folder.path / ARTIFACT,
        # int8 first, the first target's before the others': the file that answers where none is named.
        files=[*int8, fp32],
        preprocessing=job.preprocessing(job.student),
        labels=job.data.classes,
        origin=origin(job, _temperature(job)),
        thresholds=None if thresholds is None else thresholds.tolist(),
        takes_pixels=takes_pixels(job),
    )
