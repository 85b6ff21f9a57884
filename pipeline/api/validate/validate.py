"""Measure exported models on labeled images, in the runtime they ship with (`compress validate`)."""

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path

import numpy as np

from ....export.files import remove
from ....export.latency.machine import environment
from ....export.runtime import Pixels, needed_size, render
from ...data.dataset import Image, Progress, Skipped, set_gray_bits
from ...data.decode import check_unreadable, decode_each, read_pixels
from ...errors import UsageError
from ...evaluation.comparison import SIGNIFICANT, holm
from ...evaluation.predictions import make_example
from ...evaluation.results import Network, Pair, Validation, Verdict
from ...report.format import plural
from ...report.sections.classes import CLASSES_CSV, CONFUSION_CSV
from ...report.validation_page import render_validation
from ...runs.console import Display
from ...runs.files import check_outside_data, check_writable, command_line, data_text, to_csv, write_text
from ...runs.process import STOP
from ...runs.record import RECORD
from ...runs.results import Example
from ...runs.scores import Prediction
from ...tasks.base import Outputs, Task
from .images import (
    SPLIT_NAMES,
    SplitName,
    ValidationImages,
    choose_images,
    choose_images_of_runs,
    select_known,
)
from .models import Model, open_models, open_teachers

FOLDER = "validation"
BATCH = 32

MAX_EXAMPLES = 48
"""Mistakes shown with images."""

CSV_HEADER = (
    "model", "file", "label", "prediction", "probability", "correct", "teacher_prediction",
    "teacher_probability", "teacher_correct",
)  # fmt: skip


@dataclass(frozen=True)
class Logits:
    """``logits[i]`` of model i for the n readable ``images``, see ``tasks``."""

    images: tuple[Image, ...]
    logits: list[np.ndarray]
    skipped: tuple[Skipped, ...]


def run_models(images: ValidationImages, models: Sequence[Model], progress: Progress) -> Logits:
    """Run all models on the images; an ensemble of teachers gives the logits of its mean probabilities.

    Up to 1 % of all images, including those skipped before, may be unreadable.

    Raises:
        JobError: more images are unreadable, or an image was changed.
        UsageError: no image can be read.
    """
    formats = list(dict.fromkeys(model.preprocessing for model in models))
    bits = {form.gray_bits for form in formats}
    if len(bits) > 1:
        raise UsageError(
            "The models read 16-bit gray images by different numbers of bits. Validate them separately."
        )
    images = replace(images, images=set_gray_bits(images.images, bits.pop()))
    readable: list[Image] = []
    unreadable: list[Skipped] = []
    pending: list[list[Pixels]] = []
    parts: list[list[np.ndarray]] = [[] for _ in models]
    decoded = [
        decode_each(images.images, partial(render, p=form), needed=partial(needed_size, p=form))
        for form in formats
    ]
    for done, (image, *rendered) in enumerate(zip(images.images, *decoded, strict=True), 1):
        if isinstance(rendered[0], str):
            unreadable.append(Skipped(image.name, rendered[0], unreadable=True))
        else:
            readable.append(image)
            pending.append(rendered)
        if pending and (len(pending) == BATCH or done == len(images.images)):
            batch = [np.stack(column) for column in zip(*pending, strict=True)]  # uint8 [B,H,W,3] by format
            for part, model in zip(parts, models, strict=True):
                pixels = batch[formats.index(model.preprocessing)]
                logits = [network.predict_logits(pixels) for network in model.networks]
                part.append(model.task.ensemble(logits).astype(np.float32))
            pending = []
        progress(done, len(images.images))
    earlier = sum(file.unreadable for file in images.skipped)
    check_unreadable([*images.skipped, *unreadable], len(images.images) + earlier)
    if not readable:
        raise UsageError("None of the images can be read.")
    return Logits(tuple(readable), [np.concatenate(part) for part in parts], tuple(unreadable))


@dataclass(frozen=True)
class PredictionRow:
    """An image, number ``i`` of the readable ones, a model's prediction, and its teacher's if it has one."""

    i: int
    model: str
    image: Image
    label: str
    own: Prediction
    by_teacher: Prediction | None = None
    differs: bool = False
    """True if the teacher's prediction is another one."""


def predictions_csv(predictions: Iterable[PredictionRow]) -> str:
    rows: list[list[object]] = [[*CSV_HEADER]]
    for p in predictions:
        cells: list[object] = [p.model, p.image.name, p.label]
        for prediction in filter(None, [p.own, p.by_teacher]):
            correct = "yes" if prediction.is_correct else "no"
            cells += [prediction.label, f"{prediction.probability:.6f}", correct]
        rows.append(cells + [None] * (len(CSV_HEADER) - len(cells)))
    return to_csv(rows)


def make_examples(
    predictions: Sequence[PredictionRow],
    model: Model,
    outputs: Outputs,
    progress: Callable[[int, int], None],
) -> list[Example]:
    """Return examples with the images as the model receives them."""
    examples, task = [], model.task
    for done, p in enumerate(predictions, 1):
        form = model.preprocessing
        pixels = read_pixels(p.image, partial(render, p=form), partial(needed_size, p=form))
        progress(done, len(predictions))
        shown = None
        if not isinstance(pixels, str):
            shown = task.draw(pixels, outputs.labels[p.i], outputs.logits[p.i], model.labels)
        examples.append(make_example(p.image, p.label, p.own, p.by_teacher, shown, task.example_side))
    return examples


def validate(
    artifacts: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    follow_links: bool = False,
    split: SplitName | None = None,
    teacher: str | Path | None = None,
    file: str | None = None,
    ignore_unknown: bool = False,
    out: str | Path | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Validation:
    """Validate exported models, as ``compress validate`` does.

    Args:
        artifacts: run folders, artifact folders or .onnx files.
        data: labeled images, as ``data`` of a run; the runs' own data by default.
        data_dir: the folder of a named data set, or of a labels file's images.
        download: download a named data set if it is missing.
        follow_links: follow links that lead out of the data folder.
        split: ``train``, ``val``, ``test`` or ``all``; by default ``test`` if there are splits.
        teacher: a run folder or .onnx file to compare with, or ``none``; the runs' own by default.
        file: the file of an artifact to validate; by default all that are exact on this machine.
        ignore_unknown: leave out images of classes that a model does not have.
        out: the folder of validation.json, .md, .html, mistakes.csv and differences.csv; ``validation`` in a
            single run folder, or here, by default.
        threads: number of threads of ONNX Runtime; the available cores, at most 4, by default.
        quiet: do not print progress.

    Returns:
        The content of ``validation.json``, with images.

    Raises:
        UsageError: an artifact, the data or an option is wrong.
        JobError: too many images cannot be read, or the files cannot be written.
    """
    paths = [Path(path) for path in ([artifacts] if isinstance(artifacts, str | Path) else artifacts)]
    if not paths:
        raise UsageError("At least one run folder, artifact folder or .onnx file is required.")
    if split not in (None, *SPLIT_NAMES):
        raise UsageError(f"--split must be one of {', '.join(SPLIT_NAMES)}, got {split}.")
    is_run = len(paths) == 1 and (paths[0] / RECORD).is_file()
    folder = Path(out or (paths[0] / FOLDER if is_run else FOLDER))
    check_writable(folder)
    if data is not None:
        data = data_text(data)
        check_outside_data(data, {"--out": folder})
    with STOP.handle_signals(), Display(quiet=quiet).stage("validate") as stage:

        def progress(work: str) -> Progress:
            return lambda done, total: stage.update(work, done, total, "images")

        students, notes = open_models(paths, file, threads)
        teachers, teacher_of, teacher_notes = open_teachers(students, teacher, threads)
        runs = list(dict.fromkeys(student.run for student in students if student.run is not None))
        task, reading = students[0].task, progress("reading images")
        if data is None:
            images = choose_images_of_runs(runs, split, task, reading)
        else:
            images = choose_images(data, split, runs, task, data_dir, download, follow_links, reading)
        images = select_known(images, students, ignore_unknown=ignore_unknown)
        teachers, teacher_of, mismatches = _drop_mismatched(students, teachers, teacher_of)
        models = [*students, *teachers]
        logits = run_models(images, models, progress("running the models"))
        results = _Results(models, teacher_of, images, logits)
        notes += [*teacher_notes, *mismatches]
        validation = results.summarize(notes, folder, progress("rendering mistakes"))
    _write(folder, validation, results)
    return validation


def _write(folder: Path, validation: Validation, results: "_Results") -> None:
    predictions = [prediction for rows in results.predictions for prediction in rows]
    texts = {
        **render_validation(validation),
        "validation.json": to_json(validation) + "\n",
        "mistakes.csv": predictions_csv(row for row in predictions if not row.own.is_correct),
    }
    if results.teacher_of:
        texts["differences.csv"] = predictions_csv(row for row in predictions if row.differs)
    # Files of an earlier validation would be misleading.
    for name in {"differences.csv", CLASSES_CSV, CONFUSION_CSV} - {*texts}:
        remove(folder / name)
    for name, text in texts.items():
        write_text(folder / name, text)


def _drop_mismatched(
    students: Sequence[Model], teachers: Sequence[Model], teacher_of: dict[str, str]
) -> tuple[list[Model], dict[str, str], list[str]]:
    """Return teachers with the task and classes of a student, which students have them, and notes."""
    kept, notes, matched = [], [], dict(teacher_of)
    for teacher in teachers:
        own = [student for student in students if teacher_of.get(student.name) == teacher.name]
        if teacher.thresholds is None:
            thresholds = own[0].task.default_thresholds(len(teacher.labels))
            teacher = replace(teacher, recorded_thresholds=thresholds)
        is_used = False
        for student in own:
            if teacher.task is student.task and teacher.columns_of(student.labels) is not None:
                is_used = True
            else:
                del matched[student.name]
                notes.append(f"{teacher.name} has other classes than {student.name} and is not compared.")
        if is_used:
            kept.append(teacher)
    return kept, matched, notes


@dataclass(frozen=True)
class _Results:
    """Results of all models, the students first."""

    models: Sequence[Model]
    teacher_of: dict[str, str]
    images: ValidationImages
    outputs: Logits

    @cached_property
    def by_model(self) -> list[Outputs]:
        """The logits and labels of each model."""
        images = self.outputs.images
        return [
            Outputs(logits, self.images.encode(images, model), model.thresholds)
            for model, logits in zip(self.models, self.outputs.logits, strict=True)
        ]

    @cached_property
    def predictions(self) -> list[list[PredictionRow]]:
        """The predictions of each student: mistakes, the worst first, then by falling probability."""
        return [self._predict(i) for i, model in enumerate(self.models) if not model.is_teacher]

    def _predict(self, i: int) -> list[PredictionRow]:
        model, task, images = self.models[i], self.models[i].task, self.outputs.images
        own, labels = self.by_model[i], task.describe(self.by_model[i].labels, model.labels)
        by_teacher: Sequence[Prediction | None] = [None] * len(images)
        differs = np.zeros(len(images), dtype=bool)
        if (teacher := self._find_teacher(i)) is not None:
            by_teacher = task.judge(teacher, model.labels)
            differs = ~task.is_same(own, teacher)
        rows = zip(images, labels, task.judge(own, model.labels), by_teacher, differs.tolist(), strict=True)
        predictions = [PredictionRow(k, model.name, *row) for k, row in enumerate(rows)]
        return sorted(predictions, key=lambda p: (-p.own.severity, -p.own.probability, p.image.name))

    def _find_teacher(self, i: int) -> Outputs | None:
        """Return the outputs of a student's teacher in the order of the student's classes."""
        student = self.models[i]
        for model, logits in zip(self.models, self.outputs.logits, strict=True):
            if model.is_teacher and model.name == self.teacher_of.get(student.name):
                columns = model.columns_of(student.labels)
                assert columns is not None  # see _drop_mismatched
                thresholds = None if model.thresholds is None else model.thresholds[columns]
                return Outputs(model.task.reorder(logits, columns), self.by_model[i].labels, thresholds)
        return None

    def summarize(self, notes: Sequence[str], folder: Path, progress: Progress) -> Validation:
        images, readable, first = self.images, self.outputs.images, self.models[0]
        mistakes = [row for row in self.predictions[0] if not row.own.is_correct]
        counts = Counter(label for image in readable for label in image.labels)
        skipped = [*images.skipped, *self.outputs.skipped]
        warnings = list(images.warnings)
        if skipped:
            files = plural(len(skipped), "file was", "files were")
            warnings.append(f"{files} skipped; the report has the list.")
        sources = dict.fromkeys(model.source for model in self.models if not model.is_teacher)
        machine = environment()
        return Validation(
            title=f"{', '.join(path.name or str(path) for path in sources)} on {images.name}",
            command=command_line(),
            data=images.name,
            source=images.source,
            split=images.split,
            n=len(readable),
            images=images.digest(readable),
            task=first.task.name,
            per_class={name: counts[label] for label, name in enumerate(images.classes) if counts[label]},
            networks=[self._summarize_model(i) for i in range(len(self.models))],
            pairs=compare_pairs(first.task, [model.name for model in self.models], self.by_model),
            examples=make_examples(mistakes[:MAX_EXAMPLES], first, self.by_model[0], progress),
            skipped=[(file.name, file.reason) for file in skipped],
            warnings=warnings,
            notes=list(notes),
            environment={
                "cpu": machine.cpu,
                "machine": machine.machine,
                "instruction sets": ", ".join(machine.flags),
                "threads": str(first.networks[0].threads),
                "onnxruntime": machine.onnxruntime,
                "python": platform.python_version(),
            },
            folder=str(folder),
        )

    def _summarize_model(self, i: int) -> Network:
        model, task, labels, own = (
            self.models[i],
            self.models[i].task,
            self.models[i].labels,
            self.by_model[i],
        )
        logits, targets, thresholds = own.logits, own.labels, own.thresholds
        teacher = self._find_teacher(i)
        return Network(
            name=model.name,
            role="teacher" if model.is_teacher else "student",
            source=str(model.source),
            file="+".join(file.name for file in model.files),
            bytes=sum(file.stat().st_size for file in model.files),
            sha256=model.sha256,
            precision=model.precision,
            target=model.target,
            fused=model.fused,
            image_size=model.preprocessing.size,
            classes=list(labels),
            teacher=None if teacher is None else self.teacher_of[model.name],
            agreement=None if teacher is None else task.agreement(own, teacher),
            score=task.score(logits, targets, labels, thresholds),
            calibration=task.measure_calibration(logits, targets),
            mistakes=int((~task.is_correct(logits, targets, thresholds)).sum()),
            per_class=[
                measure
                for measure in task.measure_classes(logits, targets, labels, thresholds)
                if measure.n or measure.predicted
            ],
            confusion=task.confusion(logits, targets),
        )


def compare_pairs(task: Task, names: Sequence[str], outputs: Sequence[Outputs]) -> list[Pair]:
    """Compare every two models by the task's paired test."""
    pairs = list(combinations(range(len(names)), 2))
    tests = [task.compare(outputs[i], outputs[k]) for i, k in pairs]
    return [
        Pair(
            first=names[i],
            second=names[k],
            first_alone=test.first_alone,
            second_alone=test.second_alone,
            points=test.points,
            p=test.p,
            p_holm=p_holm,
            verdict=_decide(test.points, p_holm),
        )
        for (i, k), test, p_holm in zip(pairs, tests, holm([test.p for test in tests]), strict=True)
    ]


def _decide(difference: float, p: float) -> Verdict:
    if p >= SIGNIFICANT or difference == 0:
        return "no difference"
    return "better" if difference > 0 else "worse"


def to_json(validation: Validation) -> str:
    """Return the content of validation.json, without images."""
    examples = [example.model_copy(update={"png": ""}) for example in validation.examples]
    return validation.model_copy(update={"examples": examples}).model_dump_json(indent=2)
