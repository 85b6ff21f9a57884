"""Choose the labeled images to validate on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ...config import TaskName
from ...data.dataset import SPLITS, Image, Progress, Skipped, Split, printable, sort_images
from ...data.sources import open_data, read_data
from ...data.splits import UnsplitDataset, quote_names
from ...errors import UsageError
from ...report.format import plural
from ...runs.folder import RunFolder, read_config
from ...runs.hashes import digest
from ...runs.predictions import TRAIN_IMAGES_FILE, read_train_images
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
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    task: TaskName
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def present(self) -> list[str]:
        """The classes that have images."""
        labels = {label for image in self.images for label in image.labels}
        return [name for label, name in enumerate(self.classes) if label in labels]

    def digest(self, images: Sequence[Image]) -> str:
        """Return a hash of the content and labels of some of the images."""
        return digest(sorted([image.key, *(self.classes[i] for i in image.labels)] for image in images))

    def encode(self, images: Sequence[Image], labels: Sequence[str], task: Task) -> np.ndarray:
        """Return targets of ``images`` for a model with these ``labels``, see ``Task.encode``."""
        index = {name: number for number, name in enumerate(labels)}
        numbers = [index.get(name, -1) for name in self.classes]
        rows = [[numbers[label] for label in image.labels if numbers[label] >= 0] for image in images]
        return task.encode(rows, len(labels))


def choose_images(
    data: str,
    split: SplitName | None,
    runs: Collection[Path],
    data_dir: Path | None,
    download: bool,
    progress: Progress,
) -> ValidationImages:
    """Return the images of ``data`` in a split: by default those of test, or all if there are no splits.

    Raises:
        UsageError: the data do not exist or have no image in the split.
    """
    dataset = read_data(data, data_dir=data_dir, download=download, for_training=False, progress=progress)
    if split is None:
        split = "test" if dataset.has_splits else "all"
    if split != "all" and not dataset.images.get(split):
        if not dataset.has_splits:
            raise UsageError(f"--split {split}: {dataset.source} has no splits. Remove --split.")
        splits = [name for name in SPLITS if dataset.images.get(name)]
        raise UsageError(
            f"--split {split}: {dataset.source} has no {split} images but {' and '.join(splits)} images."
        )
    splits_used: Sequence[Split] = SPLITS if split == "all" else (split,)
    images = [image for name in splits_used for image in dataset.images.get(name, ())]
    if not images:
        raise UsageError(f"{dataset.source} has no readable images.")
    warnings = [*_warn_of_copies(images), *_warn_of_training(dataset, images, split, runs)]
    return ValidationImages(
        dataset.name,
        dataset.source,
        split,
        tuple(dataset.classes),
        sort_images(images),
        dataset.task,
        tuple(dataset.skipped),
        tuple(warnings),
    )


def _warn_of_copies(images: Sequence[Image]) -> list[str]:
    labels: dict[str, set[tuple[int, ...]]] = {}
    for image in images:
        labels.setdefault(image.key, set()).add(image.labels)
    copies = len(images) - len(labels)
    conflicts = sum(len(different) > 1 for different in labels.values())
    warnings = []
    if copies:
        warnings.append(f"{copies} of the {len(images)} images are copies of others; each is counted.")
    if conflicts:
        warnings.append(f"{conflicts} images are in more than one class, so one copy is always a mistake.")
    return warnings


def _warn_of_training(
    dataset: UnsplitDataset, images: Sequence[Image], split: SplitName, runs: Collection[Path]
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
        count = sum(image.number in trained for image in images)
        if count:
            warnings.append(
                f"{run.name} was trained on {count:,} of {plural(len(images), 'image')}, so the results are "
                "too good."
            )
    return warnings


def _is_data_of(dataset: UnsplitDataset, run: Path, fingerprint: str) -> bool:
    try:
        return dataset.split(read_config(run).get("val_fraction")).fingerprint == fingerprint
    except UsageError:
        return False


def choose_images_of_runs(
    runs: Sequence[Path], split: SplitName | None, progress: Progress
) -> ValidationImages:
    """Return the images of the runs' own data, by default their test images.

    Raises:
        UsageError: they no longer exist, were changed, or differ between the runs.
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
    source = printable(str(config["data"]))
    try:
        data = open_data(
            config["data"],
            data_dir=None if config.get("data_dir") is None else Path(config["data_dir"]),
            val_fraction=config.get("val_fraction"),
            progress=progress,
        )
    except UsageError as error:
        raise UsageError(
            f"The data of {runs[0]} cannot be read: {error} Set --data to labeled images."
        ) from error
    if data.fingerprint != fingerprints[0]:
        raise UsageError(
            f"{source} has changed since {runs[0]} was made: images were added, removed or modified. "
            "Set --data to labeled images."
        )
    split = split or "test"
    splits: Sequence[Split] = SPLITS if split == "all" else (split,)
    images = tuple(image for name in splits for image in data.split(name))
    if not images:
        raise UsageError(f"--split {split}: {runs[0]} has no {split} images.")
    warnings: tuple[str, ...] = ()
    if split in ("train", "all"):
        warnings = ("The models were trained on these images, so the results are too good.",)
    elif split == "val":
        warnings = ("The exported file was chosen on the validation images, so the results are too good.",)
    return ValidationImages(
        data.name, data.source, split, data.classes, images, data.task, data.skipped, warnings
    )


def select_known(
    images: ValidationImages, models: Sequence[Model], *, ignore_unknown: bool
) -> ValidationImages:
    """Return the images whose classes all models have.

    Raises:
        UsageError: a class is unknown and ``ignore_unknown`` is False, or the tasks differ.
    """
    task = models[0].task
    for model in models:
        if model.task is not task:
            raise UsageError(
                f"{models[0].name} and {model.name} cannot be compared: their tasks are {task.name} and "
                f"{model.task.name}."
            )
    if images.task not in task.accepts:
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
    if not kept or not any(name not in unknown for name in images.present):
        raise UsageError(f"{images.source}: the models have none of its classes ({names}).")
    effect = f"{dropped} images were left out" if dropped else "these labels are ignored"
    warning = f"The models do not have the classes {names}: {effect}."
    return replace(images, images=kept, warnings=(*images.warnings, warning))


def _describe_unknown(images: ValidationImages, unknown: dict[str, Model]) -> str:
    names = [name for name in images.present if name in unknown]
    model = unknown[names[0]]
    labels = {label.lower(): label for label in model.labels}
    near = [labels[name] for name in get_close_matches(names[0].lower(), labels, n=1, cutoff=0.7)]
    hint = f" ('{names[0]}' may be its '{near[0]}')" if near else ""
    return (
        f"{images.source} has the classes {quote_names(names)}, which {model.name} does not have{hint}. "
        f"It has {quote_names(list(model.labels), 12)}. Rename or remove them, or skip such images with "
        "--ignore-unknown."
    )
