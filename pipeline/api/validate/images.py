"""Choose the labeled images to validate models on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ...config import TaskName
from ...data.copies import find_copies
from ...data.dataset import SPLITS, Copies, Image, ImageSet, Progress, Skipped, printable, sort_images
from ...data.sources import open_data, read_data
from ...data.splits import UnsplitDataset, drop_repeated, quote_names
from ...errors import UsageError
from ...report.format import plural
from ...runs.artifacts import (
    TRAIN_IMAGES_FILE,
    read_train_images,
)
from ...runs.cache import Cache
from ...runs.files import describe_namesake
from ...runs.folder import RunFolder, read_config
from ...runs.hashes import digest
from ...tasks.base import Task
from .models import Model

SplitName = Literal["train", "val", "test", "all"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)


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
    warnings += _warn_of_training(dataset, images, split, runs, task, progress)
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
    dataset: UnsplitDataset,
    images: Sequence[Image],
    split: SplitName,
    runs: Sequence[Path],
    task: Task,
    progress: Progress,
) -> list[str]:
    """Return warnings if a model was trained on these images, on some of them, or on copies of them."""
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
        copies = _find_copies_of_training(images, run, task, progress)
        if count := sum(image.number in trained or image.key in copies for image in images):
            warnings.append(
                f"{run.name} was trained on {count:,} of {plural(len(images), 'image')} or on their copies, "
                "so the results are too good."
            )
    return warnings


def _find_copies_of_training(images: Sequence[Image], run: Path, task: Task, progress: Progress) -> set[str]:
    """Return the keys of images with a near copy among a run's training images, if its data still exists."""
    try:
        data = _open_data_of_run(run, task, progress)
    except UsageError:  # moved or changed: the recorded content is compared alone
        return set()
    alike = [replace(image, label=0, label_set=None) for image in (*images, *data.train)]
    copies = find_copies(alike, Cache(), progress)
    groups = {copies.group(image) for image in data.train}
    return {image.key for image in images if copies.group(image) in groups}


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
    try:
        data = _open_data_of_run(runs[0], task, progress)
    except UsageError as error:
        raise UsageError(
            f"The data of {runs[0]} cannot be read: {error} Set --data to labeled images."
        ) from error
    if data.fingerprint != fingerprints[0]:
        source = printable(str(read_config(runs[0])["data"]))
        raise UsageError(
            f"{source} has changed since {runs[0]} was made: images were added, removed or modified. Set "
            "--data to labeled images."
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


def _open_data_of_run(run: Path, task: Task, progress: Progress) -> ImageSet:
    config = read_config(run)
    return open_data(
        config["data"],
        data_dir=None if config.get("data_dir") is None else Path(config["data_dir"]),
        follow_links=bool(config.get("follow_links")),
        val_fraction=config.get("val_fraction"),
        with_boxes=task.has_boxes,
        cache=Cache(),
        progress=progress,
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
