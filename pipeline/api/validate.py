"""Measure exported models on labeled images, in the runtime they ship with (`compress validate`)."""

import csv
import io
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from ...export.files import remove
from ...export.latency.machine import environment
from ...export.runtime import Pixels, render
from ..data.dataset import Image, Progress, Skipped
from ..data.decode import check_unreadable, decode_each, read_pixels
from ..errors import UsageError
from ..evaluation import calibration
from ..evaluation.comparison import SIGNIFICANT, holm, mcnemar
from ..evaluation.mistakes import make_example, most_confused
from ..evaluation.results import Network, Pair, Validation, Verdict
from ..report.format import plural
from ..report.pages.validation import render_validation
from ..runs.console import Display
from ..runs.files import check_outside_data, command_line, escape_cell, write_text
from ..runs.process import STOP
from ..runs.record import RECORD
from ..runs.results import Example
from . import validate_inputs as validation_images
from .validate_inputs import SPLIT_NAMES, Model, SplitName, ValidationImages, open_models, open_teachers

BATCH = 32


@dataclass(frozen=True)
class Logits:
    """``logits[i]`` float32 [n,classes] of model i for the n readable ``images``."""

    images: tuple[Image, ...]
    logits: list[np.ndarray]
    skipped: tuple[Skipped, ...]


def run_models(
    images: Sequence[Image], models: Sequence[Model], skipped: Sequence[Skipped], progress: Progress
) -> Logits:
    """Run all models on the images; an ensemble of teachers gives the logits of its mean probabilities.

    Up to 1 % of all images, including those ``skipped`` before, may be unreadable.

    Raises:
        JobError: more images are unreadable, or an image was changed.
        UsageError: no image can be read.
    """
    formats = list(dict.fromkeys(model.preprocessing for model in models))
    readable: list[Image] = []
    unreadable: list[Skipped] = []
    parts: list[list[np.ndarray]] = [[] for _ in models]
    render_all = lambda image: [render(image, form) for form in formats]  # noqa: E731
    for batch, rendered in _batches(images, render_all, unreadable, progress):
        readable += batch
        for part, model in zip(parts, models, strict=True):
            pixels = rendered[formats.index(model.preprocessing)]
            logits = [classifier.predict_logits(pixels) for classifier in model.classifiers]
            part.append(model.task.likelihood.ensemble(logits).astype(np.float32))
    earlier = sum(file.unreadable for file in skipped)
    check_unreadable([*skipped, *unreadable], len(images) + earlier)
    if not readable:
        raise UsageError("None of the images can be read.")
    return Logits(tuple(readable), [np.concatenate(part) for part in parts], tuple(unreadable))


def _batches(
    images: Sequence[Image],
    render_all: Callable[[Pixels], list[Pixels]],
    unreadable: list[Skipped],
    progress: Progress,
) -> Iterator[tuple[list[Image], list[np.ndarray]]]:
    """Yield readable images and their pixels uint8 [B,S,S,3] in each format; others go to ``unreadable``."""
    batch: list[tuple[Image, list[Pixels]]] = []
    for done, (image, rendered) in enumerate(zip(images, decode_each(images, render_all), strict=True), 1):
        if isinstance(rendered, str):
            unreadable.append(Skipped(image.name, rendered, unreadable=True))
        else:
            batch.append((image, rendered))
        if batch and (len(batch) == BATCH or done == len(images)):
            columns = zip(*(pixels for _, pixels in batch), strict=True)
            yield [image for image, _ in batch], [np.stack(column) for column in columns]
            batch = []
        progress(done, len(images))


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for an image, and its teacher's if it has one."""

    model: str
    image: Image
    label: str
    predicted: str
    probability: float
    teacher: str | None = None
    teacher_probability: float | None = None

    @property
    def is_correct(self) -> bool:
        return self.predicted == self.label

    @property
    def differs(self) -> bool:
        """True if the teacher's prediction is another one."""
        return self.teacher is not None and self.teacher != self.predicted


@dataclass(frozen=True)
class TeacherOutputs:
    """Logits [n,classes] and thresholds of a teacher, in the order of its student's classes."""

    name: str
    logits: np.ndarray
    thresholds: np.ndarray | None


def list_predictions(
    model: Model,
    logits: np.ndarray,
    targets: np.ndarray,
    images: Sequence[Image],
    teacher: TeacherOutputs | None,
) -> list[Prediction]:
    """Return a prediction for each image, the most confident first."""
    labels = model.task.describe(targets, model.labels)
    predicted = model.task.decode(logits, model.labels, model.thresholds)
    by_teacher: Sequence[tuple[str | None, float | None]] = [(None, None)] * len(images)
    if teacher is not None:
        by_teacher = model.task.decode(teacher.logits, model.labels, teacher.thresholds)
    predictions = [
        Prediction(model.name, image, label, *own, *other)
        for image, label, own, other in zip(images, labels, predicted, by_teacher, strict=True)
    ]
    return sorted(predictions, key=lambda prediction: (-prediction.probability, prediction.image.name))


CSV_HEADER = (
    "model", "file", "label", "prediction", "probability", "correct", "teacher_prediction",
    "teacher_probability", "teacher_correct",
)  # fmt: skip


def to_csv(predictions: Iterable[Prediction]) -> str:
    """Return a CSV table with escaped cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for p in predictions:
        cells = [p.model, p.image.name, p.label, p.predicted, f"{p.probability:.6f}", _yes(p.is_correct)]
        if p.teacher is None:
            cells += ["", "", ""]
        else:
            cells += [p.teacher, f"{p.teacher_probability:.6f}", _yes(p.teacher == p.label)]
        writer.writerow([escape_cell(cell) for cell in cells])
    return text.getvalue()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def make_examples(
    predictions: Sequence[Prediction], model: Model, progress: Callable[[int, int], None]
) -> list[Example]:
    """Return examples with the images as the model receives them."""
    examples = []
    for done, p in enumerate(predictions, 1):
        pixels = read_pixels(p.image, lambda image: render(image, model.preprocessing))
        progress(done, len(predictions))
        by_teacher = None
        if p.teacher is not None and p.teacher_probability is not None:
            by_teacher = (p.teacher, p.teacher_probability)
        shown = None if isinstance(pixels, str) else pixels
        examples.append(make_example(p.image, p.label, (p.predicted, p.probability), by_teacher, shown))
    return examples


FOLDER = "validation"

MAX_EXAMPLES = 48
"""Mistakes shown with images."""

MAX_CONFUSION_CLASSES = 100
"""Classes of a confusion matrix that is stored; the most confused pairs are listed in any case."""


def validate(
    artifacts: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
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
        split: ``train``, ``val``, ``test`` or ``all``; by default ``test`` if there are splits.
        teacher: a run folder or .onnx file to compare with, or ``none``; the runs' own by default.
        file: the file of an artifact to validate; by default all that are exact on this machine.
        ignore_unknown: skip images of classes that a model does not have.
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
    if split is not None and split not in SPLIT_NAMES:
        raise UsageError(f"--split must be one of {', '.join(SPLIT_NAMES)}, got {split}.")
    folder = _choose_folder(paths, out)
    if data is not None:
        check_outside_data(data, {"--out": folder})
    with STOP.handle_signals(), Display(quiet=quiet).stage("validate") as stage:

        def progress(work: str) -> Progress:
            return lambda done, total: stage.update(work, done, total, "images")

        students, notes = open_models(paths, file, threads)
        teachers, teacher_of, teacher_notes = open_teachers(
            students, None if teacher is None else str(teacher), threads
        )
        runs = list(dict.fromkeys(student.run for student in students if student.run is not None))
        if data is None:
            images = validation_images.choose_images_of_runs(runs, split, progress("reading images"))
        else:
            images_folder = None if data_dir is None else Path(data_dir)
            images = validation_images.choose_images(
                str(data), split, runs, images_folder, download, progress("reading images")
            )
        images = validation_images.select_known(images, students, ignore_unknown=ignore_unknown)
        teachers, teacher_of, mismatches = _drop_mismatched(students, teachers, teacher_of)
        models = [*students, *teachers]
        logits = run_models(images.images, models, images.skipped, progress("running the models"))
        results = _Results(models, len(students), teacher_of, images, logits)
        notes += [*teacher_notes, *mismatches]
        validation = results.summarize(notes, folder, progress("rendering mistakes"))
    predictions = [prediction for rows in results.predictions for prediction in rows]
    texts = {
        **render_validation(validation),
        "validation.json": to_json(validation) + "\n",
        "mistakes.csv": to_csv(row for row in predictions if not row.is_correct),
    }
    if teacher_of:
        texts["differences.csv"] = to_csv(row for row in predictions if row.differs)
    for name, text in texts.items():
        write_text(folder / name, text)
    if not teacher_of:  # one of an earlier validation would be misleading
        remove(folder / "differences.csv")
    return validation


def _choose_folder(paths: Sequence[Path], out: str | Path | None) -> Path:
    is_run = len(paths) == 1 and (paths[0] / RECORD).is_file()
    folder = Path(out) if out is not None else paths[0] / FOLDER if is_run else Path(FOLDER)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file. Set it to a folder.")
    return folder


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
    """Logits of all models, of which the first ``num_students`` are not teachers."""

    models: Sequence[Model]
    num_students: int
    teacher_of: dict[str, str]
    images: ValidationImages
    outputs: Logits

    @cached_property
    def targets(self) -> list[np.ndarray]:
        task = self.models[0].task
        return [self.images.encode(self.outputs.images, model.labels, task) for model in self.models]

    @cached_property
    def correct(self) -> list[np.ndarray]:
        """For each model, bool [n]."""
        rows = zip(self.models, self.outputs.logits, self.targets, strict=True)
        return [model.task.is_correct(logits, targets, model.thresholds) for model, logits, targets in rows]

    @cached_property
    def predictions(self) -> list[list[Prediction]]:
        """Those of each student."""
        return [
            list_predictions(
                self.models[i],
                self.outputs.logits[i],
                self.targets[i],
                self.outputs.images,
                self._find_teacher(self.models[i]),
            )
            for i in range(self.num_students)
        ]

    def _find_teacher(self, student: Model) -> TeacherOutputs | None:
        for model, logits in zip(self.models, self.outputs.logits, strict=True):
            if model.is_teacher and model.name == self.teacher_of.get(student.name):
                columns = model.columns_of(student.labels)
                assert columns is not None  # see _drop_mismatched
                thresholds = None if model.thresholds is None else model.thresholds[columns]
                return TeacherOutputs(model.name, logits[:, columns], thresholds)
        return None

    def summarize(self, notes: Sequence[str], folder: Path, progress: Progress) -> Validation:
        images, readable, first = self.images, self.outputs.images, self.models[0]
        mistakes = [row for row in self.predictions[0] if not row.is_correct]
        counts = Counter(label for image in readable for label in image.labels)
        skipped = [*images.skipped, *self.outputs.skipped]
        unreadable = sum(file.unreadable for file in skipped)
        warnings = list(images.warnings)
        if unreadable:
            warnings.append(f"{plural(unreadable, 'image')} could not be read.")
        sources = dict.fromkeys(model.source for model in self.models[: self.num_students])
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
            pairs=compare_pairs([model.name for model in self.models], self.correct),
            examples=make_examples(mistakes[:MAX_EXAMPLES], first, progress),
            skipped=[(file.name, file.reason) for file in skipped],
            warnings=warnings,
            notes=list(notes),
            environment={
                "cpu": machine.cpu,
                "machine": machine.machine,
                "instruction sets": ", ".join(machine.flags),
                "threads": str(first.classifiers[0].threads),
                "onnxruntime": machine.onnxruntime,
                "python": platform.python_version(),
            },
            folder=str(folder),
        )

    def _summarize_model(self, i: int) -> Network:
        model, logits, targets = self.models[i], self.outputs.logits[i], self.targets[i]
        task, labels, thresholds = model.task, model.labels, model.thresholds
        teacher = self._find_teacher(model)
        agreement = None
        if teacher is not None:
            agreement = task.agreement(logits, teacher.logits, thresholds, teacher.thresholds)
        table = task.confusion(logits, targets)
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
            teacher=None if teacher is None else teacher.name,
            agreement=agreement,
            score=task.score(logits, targets, labels, thresholds),
            calibration=calibration.measure(logits, targets, task.likelihood),
            mistakes=int((~self.correct[i]).sum()),
            per_class=task.measure_classes(logits, targets, labels, thresholds),
            confusion=None if table is None or len(labels) > MAX_CONFUSION_CLASSES else table.tolist(),
            confused=[] if table is None else most_confused(table, labels),
        )


def compare_pairs(names: Sequence[str], correct: Sequence[np.ndarray]) -> list[Pair]:
    """Compare every two models by McNemar's exact test; ``correct`` is bool [n] for each model."""
    indices = list(combinations(range(len(names)), 2))
    counts = [
        (int((correct[i] & ~correct[k]).sum()), int((correct[k] & ~correct[i]).sum())) for i, k in indices
    ]
    p_values = [mcnemar(first, second) for first, second in counts]
    return [
        Pair(
            first=names[i],
            second=names[k],
            first_alone=first,
            second_alone=second,
            points=100 * (first - second) / len(correct[i]),
            p=p,
            p_holm=p_holm,
            verdict=_decide(first - second, p_holm),
        )
        for (i, k), (first, second), p, p_holm in zip(indices, counts, p_values, holm(p_values), strict=True)
    ]


def _decide(difference: int, p: float) -> Verdict:
    if p >= SIGNIFICANT or difference == 0:
        return "no difference"
    return "better" if difference > 0 else "worse"


def to_json(validation: Validation) -> str:
    """Return the content of validation.json, without images."""
    examples = [example.model_copy(update={"png": ""}) for example in validation.examples]
    return validation.model_copy(update={"examples": examples}).model_dump_json(indent=2)
