"""Open the models to validate, and choose the labeled images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ...export.conversion.untrusted import read_untrusted
from ...export.errors import ExportError
from ...export.int8.targets import TARGETS, is_exact_here
from ...export.runtime import ArtifactError, Preprocessing, open_content, open_session
from ...export.runtime import Model as Network
from ...models.checkpoint import tensors_digest
from ..config import TaskName
from ..data.copies import find_copies
from ..data.dataset import SPLITS, Copies, Image, Progress, Skipped, printable, sort_images
from ..data.sources import open_data, read_data
from ..data.splits import UnsplitDataset, drop_repeated, quote_names
from ..errors import UsageError
from ..report.format import plural
from ..runs.artifacts import (
    TRAIN_IMAGES_FILE,
    ModelFile,
    find_teacher_files,
    name_files,
    open_files,
    read_train_images,
)
from ..runs.cache import Cache
from ..runs.files import describe_namesake
from ..runs.folder import RunFolder, read_config
from ..runs.hashes import digest, sha256
from ..runs.record import RECORD
from ..runs.results import Subject
from ..tasks import task_of_file
from ..tasks.base import Task

SplitName = Literal["train", "val", "test", "all"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)


@dataclass(frozen=True)
class Model:
    """One file, or an ensemble of teachers."""

    name: str
    networks: tuple[Network, ...]
    source: Path
    files: tuple[Path, ...]
    precision: str | None = None
    target: str | None = None
    fused: bool = True
    """False if int8 is simulated in float, without integer kernels."""
    run: Path | None = None
    is_teacher: bool = False
    recorded_thresholds: np.ndarray | None = None
    """Thresholds of a teacher, whose file does not contain them."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the network's classes."""
        return self.networks[0].labels

    @property
    def thresholds(self) -> np.ndarray | None:
        """Thresholds by class of a multi-label model."""
        own = self.networks[0].thresholds
        return self.recorded_thresholds if own is None else own

    @property
    def task(self) -> Task:
        return task_of_file(self.networks[0], self.thresholds)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.networks[0].preprocessing

    @cached_property
    def sha256(self) -> str:
        """Checksums of the files."""
        return "+".join(sha256(file) for file in self.files)

    def columns_of(self, labels: Sequence[str]) -> list[int] | None:
        """Return the model's class numbers in the order of ``labels``, or None if it has other classes."""
        if sorted(labels) != sorted(self.labels):
            return None
        return [self.labels.index(label) for label in labels]


def open_models(
    paths: Sequence[Path], file: str | None, threads: int | None
) -> tuple[list[Model], list[str]]:
    """Open the files of each path, and return notes on those that are not validated."""
    files: dict[Path, ModelFile] = {}
    notes = []
    for path in paths:
        for model in open_files(path, file):
            if file is None and not _is_exact(model):
                notes.append(
                    f"{model.path.name} is made for {model.target} and is not validated on this machine. "
                    f"--file {model.path.name} validates it in simulated quantization."
                )
            else:
                files.setdefault(model.path.resolve(), model)
    names = name_files((model.source, model.name) for model in files.values())
    try:
        return [_open(m, name, threads) for m, name in zip(files.values(), names, strict=True)], notes
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error


def _is_exact(file: ModelFile) -> bool:
    return file.target not in TARGETS or is_exact_here(file.target)


def _open(file: ModelFile, name: str, threads: int | None) -> Model:
    network = open_content(file.content, file.path.name, threads=threads, manifest=file.manifest)
    fused = _is_exact(file)
    if not fused:
        network.session = open_session(file.content, network.threads, fuse=False, name=file.path.name)
    return Model(name, (network,), file.source, (file.path,), file.precision, file.target, fused, file.run)


def open_teachers(
    students: Sequence[Model], teacher: str | Path | None, threads: int | None
) -> tuple[list[Model], dict[str, str], list[str]]:
    """Open ``teacher``: a run folder, an .onnx file, ``none``, or None for those of the students' runs.

    Returns:
        The teachers, the name of each student's teacher, and notes.
    """
    if str(teacher) == "none":
        return [], {}, []
    if teacher is not None:
        model = _open_given_teacher(Path(teacher), threads)
        return [model], {student.name: model.name for student in students}, []
    keys: dict[Path, str] = {}
    distinct: dict[str, Model] = {}
    notes = []
    for run in dict.fromkeys(student.run for student in students if student.run is not None):
        try:
            opened = _open_teacher_of(run, threads)
        except (ArtifactError, UsageError) as error:
            notes.append(f"{str(error).rstrip('.')}. The models of {run.name} are not compared with it.")
            continue
        # A teacher that is validated itself is not compared with itself.
        validated = {file.resolve() for student in students if student.run == run for file in student.files}
        if opened is not None and {file.resolve() for file in opened.files} != validated:
            keys[run] = _key(run, opened)
            distinct.setdefault(keys[run], opened)
    add_run = len(distinct) > 1 or any(student.name == "teacher" for student in students)
    teachers = {
        key: replace(model, name=f"{model.source.name} teacher" if add_run else "teacher")
        for key, model in distinct.items()
    }
    teacher_of = {s.name: teachers[keys[s.run]].name for s in students if s.run is not None and s.run in keys}
    if not teachers and not notes:
        notes.append(
            "The models are not compared with a teacher. Set --teacher to a run folder (whose "
            "bench/teacher.onnx is used) or to an .onnx file exported by compress."
        )
    return list(teachers.values()), teacher_of, notes


def _key(run: Path, teacher: Model) -> str:
    """Return an identifier of weights and image size, since the files also contain other metadata."""
    weights = [run / file.with_suffix(".safetensors").name for file in teacher.files]
    if not all(file.is_file() for file in weights):
        return teacher.sha256
    sizes = [str(network.preprocessing.size) for network in teacher.networks]
    return "+".join([*map(tensors_digest, weights), *sizes])


def _open_given_teacher(path: Path, threads: int | None) -> Model:
    try:
        if path.is_file():
            return replace(_open(open_files(path)[0], "teacher", threads), is_teacher=True, run=None)
        model = _open_teacher_of(path, threads) if (path / RECORD).is_file() else None
    except ArtifactError as error:
        raise UsageError(f"--teacher {path}: {error}.") from error
    if model is None:
        raise UsageError(
            f"--teacher {path} must be an .onnx file or a run folder with bench/teacher.onnx, which the "
            "bench stage writes. Set it to none to validate without a teacher."
        )
    return model


def _open_teacher_of(run: Path, threads: int | None) -> Model | None:
    """Open a run's teacher or ensemble of teachers, or return None if it has no file."""
    files = find_teacher_files(run)
    if not files:
        return None
    folder = RunFolder.read(run)
    facts = folder.facts()
    try:
        subject = None if facts.get("teacher") is None else Subject.model_validate(facts["teacher"])
        heads = [teacher.get("head") for teacher in facts.get("teachers", ())]
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{run / RECORD}: the entry of the teacher is invalid.") from error
    if len(heads) == len(files):
        files = [file for file, head in zip(files, heads, strict=True) if head != "none"]
    if not files:
        raise UsageError(f"The teacher of {run} has no head and predicts no classes.")
    for file in files:
        if file.with_name(f"{file.name}.data").exists():
            raise UsageError(f"{file} has external weights of more than 2 GB.")
        for output in (file, run / file.with_suffix(".safetensors").name):
            folder.check_output(output.relative_to(run).as_posix())
    try:
        contents = [read_untrusted(file)[0] for file in files]
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    networks = tuple(
        open_content(content, file.name, threads=threads)
        for content, file in zip(contents, files, strict=True)
    )
    recorded = None if subject is None else subject.thresholds
    return Model(
        "teacher", networks, run, tuple(files), run=run, is_teacher=True, recorded_thresholds=recorded
    )


@dataclass(frozen=True)
class ValidationImages:
    """Labeled images. Their labels are indices of ``classes``."""

    name: str
    source: str
    split: SplitName
    classes: Sequence[str]
    images: Sequence[Image]
    task: TaskName
    skipped: Sequence[Skipped] = ()
    warnings: Sequence[str] = ()

    @property
    def present(self) -> list[str]:
        """The classes that have images."""
        labels = {label for image in self.images for label in image.labels}
        return [name for label, name in enumerate(self.classes) if label in labels]

    def digest(self, images: Sequence[Image]) -> str:
        """Return a hash of the content and labels of some of the images."""
        return digest(sorted([image.key, *(self.classes[i] for i in image.labels)] for image in images))

    def encode(self, images: Sequence[Image], model: Model) -> np.ndarray:
        """Return the labels of ``images`` as the model's classes, see ``Task.encode``."""
        index = {name: number for number, name in enumerate(model.labels)}
        numbers = [index.get(name, -1) for name in self.classes]
        return model.task.encode(images, numbers, len(model.labels), model.preprocessing)


def choose_images(
    data: str,
    split: SplitName | None,
    runs: Sequence[Path],
    task: Task,
    data_dir: str | Path | None,
    download: bool,
    follow_links: bool,
    progress: Progress,
) -> ValidationImages:
    """Return the images of ``data`` in a split, with labels for a task.

    The split is by default test, or all if there are no splits.
    """
    folder = None if data_dir is None else Path(data_dir)
    dataset = read_data(
        data,
        data_dir=folder,
        download=download,
        follow_links=follow_links,
        for_training=False,
        with_boxes=task.has_boxes,
        progress=progress,
    )
    if split is None:
        split = "test" if dataset.has_splits else "all"
    if split != "all" and not dataset.images.get(split):
        if not dataset.has_splits:
            raise UsageError(f"--split {split}: {dataset.source} has no splits. Remove --split.")
        splits = [name for name in SPLITS if dataset.images.get(name)]
        raise UsageError(
            f"--split {split}: {dataset.source} has no {split} images but {' and '.join(splits)} images."
        )
    images = [image for name in SPLITS if split in (name, "all") for image in dataset.images.get(name, ())]
    if not images:
        raise UsageError(f"{dataset.source} has no readable images.")
    images, warnings = _drop_copies(images, find_copies(images, Cache(), progress))
    warnings += _warn_of_training(dataset, images, split, runs)
    if (namesake := describe_namesake(data)) is not None:
        warnings.append(namesake)
    name, source, classes, skipped = dataset.name, dataset.source, dataset.classes, dataset.skipped
    return ValidationImages(
        name, source, split, classes, sort_images(images), dataset.task, skipped, warnings
    )


def _drop_copies(images: Sequence[Image], copies: Copies) -> tuple[list[Image], list[str]]:
    """Return images of which each content counts once in a class, and warnings."""
    kept, repeated = drop_repeated(images, copies)
    conflicts = sum(count > 1 for count in Counter(map(copies.content, kept)).values())
    warnings = []
    if repeated:
        are_copies = "is a copy of another and is" if len(repeated) == 1 else "are copies of others and are"
        warnings.append(f"{len(repeated)} of the {len(images)} images {are_copies} left out.")
    if conflicts:
        several = plural(conflicts, "image is", "images are")
        warnings.append(f"{several} in more than one class, so one copy is always a mistake.")
    return kept, warnings


def _warn_of_training(
    dataset: UnsplitDataset, images: Sequence[Image], split: SplitName, runs: Sequence[Path]
) -> list[str]:
    """Return warnings if a model was trained on these images or on some of them."""
    if split != "test":
        for run in runs:
            facts = RunFolder.read(run).facts().get("data")
            if facts is not None and _is_data_of(dataset, run, facts["fingerprint"]):
                return [
                    f"These are the images of {run.name}, which was trained on {facts['train']} of them, so "
                    "the results are too good. Without --data, its test images are used."
                ]
    warnings = []
    for run in runs:
        RunFolder.read(run).check_output(TRAIN_IMAGES_FILE)
        trained = read_train_images(run)
        if count := sum(image.number in trained for image in images):
            warnings.append(
                f"{run.name} was trained on {count:,} of {plural(len(images), 'image')}, so the results are "
                "too good."
            )
    return warnings


def _is_data_of(dataset: UnsplitDataset, run: Path, fingerprint: str) -> bool:
    copies = find_copies(chain(*dataset.images.values()), Cache())
    try:
        return dataset.split(read_config(run).get("val_fraction"), copies).fingerprint == fingerprint
    except UsageError:
        return False


def choose_images_of_runs(
    runs: Sequence[Path], split: SplitName | None, task: Task, progress: Progress
) -> ValidationImages:
    """Return the images of the runs' own data, by default their test images.

    The data must still exist, be unchanged, and be the same for all runs.
    """
    if not runs:
        raise UsageError(
            "--data is missing: without a run folder there are no test images. Set it to labeled images, "
            "such as --data photos/."
        )
    fingerprints = []
    for run in runs:
        facts = RunFolder.read(run).facts().get("data")
        if facts is None:
            raise UsageError(f"{run} has not read its data yet. Set --data to labeled images.")
        fingerprints.append(facts["fingerprint"])
        if fingerprints[0] != fingerprints[-1]:
            raise UsageError(
                f"{runs[0].name} and {run.name} have different data. Set --data to the images to use."
            )
    config = read_config(runs[0])
    try:
        data = open_data(
            config["data"],
            data_dir=None if config.get("data_dir") is None else Path(config["data_dir"]),
            follow_links=bool(config.get("follow_links")),
            val_fraction=config.get("val_fraction"),
            with_boxes=task.has_boxes,
            cache=Cache(),
            progress=progress,
        )
    except UsageError as error:
        raise UsageError(
            f"The data of {runs[0]} cannot be read: {error} Set --data to labeled images."
        ) from error
    if data.fingerprint != fingerprints[0]:
        raise UsageError(
            f"{printable(str(config['data']))} has changed since {runs[0]} was made: images were added, "
            "removed or modified. Set --data to labeled images."
        )
    split = split or "test"
    images = [image for name in SPLITS if split in (name, "all") for image in data.split(name)]
    if not images:
        raise UsageError(f"--split {split}: {runs[0]} has no {split} images.")
    warnings = []
    if split in ("train", "all"):
        warnings.append("The models were trained on these images, so the results are too good.")
    elif split == "val":
        warnings.append("The exported file was chosen on the validation images, so the results are too good.")
    return ValidationImages(
        data.name, data.source, split, data.classes, images, data.task, data.skipped, warnings
    )


def select_known(
    images: ValidationImages, models: Sequence[Model], *, ignore_unknown: bool
) -> ValidationImages:
    """Return the images whose classes all models have; without ``ignore_unknown``, all must be known."""
    task = models[0].task
    for model in models:
        if model.task is not task:
            raise UsageError(
                f"{models[0].name} and {model.name} cannot be compared: their tasks are {task.name} and "
                f"{model.task.name}."
            )
    if images.task not in (task.name, *task.accepts):
        raise UsageError(
            f"{images.source}: the labels are {images.task}, but {models[0].name} is for {task.name}. "
            "Use data of that task."
        )
    unknown = {name: m for m in reversed(models) for name in images.present if name not in m.labels}
    if not unknown:
        return images
    if not ignore_unknown:
        raise UsageError(_describe_unknown(images, unknown))
    dropped_labels = {label for label, name in enumerate(images.classes) if name in unknown}
    kept = task.drop_unknown(images.images, dropped_labels)
    dropped = len(images.images) - len(kept)
    names = quote_names(list(unknown))
    if not kept or set(images.present) <= set(unknown):
        raise UsageError(f"{images.source}: the models have none of its classes ({names}).")
    left_out = plural(dropped, "image is", "images are") if dropped else "these labels are"
    warning = f"The models do not have the classes {names}: {left_out} left out."
    return replace(images, images=kept, warnings=(*images.warnings, warning))


def _describe_unknown(images: ValidationImages, unknown: dict[str, Model]) -> str:
    names = [name for name in images.present if name in unknown]
    model = unknown[names[0]]
    labels = {label.lower(): label for label in model.labels}
    near = [labels[name] for name in get_close_matches(names[0].lower(), labels, n=1, cutoff=0.7)]
    hint = f" ('{names[0]}' may be its '{near[0]}')" if near else ""
    return (
        f"{images.source} has the classes {quote_names(names)}, which {model.name} does not have{hint}. "
        f"It has {quote_names(list(model.labels), 12)}. Rename or remove them, or leave such images out with "
        "--ignore-unknown."
    )
