"""Split images into train, val and test. The result depends on their content only, not on names or order."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..config import TaskName
from ..errors import UsageError
from .dataset import SPLITS, Copies, Duplicate, Image, ImageSet, Leak, Skipped, Split, sort_images

TEST_FRACTION = VAL_FRACTION = 0.1

NO_CLASS = -1
"""Stands for the class of multi-label images without classes, so that they are held out as well."""


@dataclass(frozen=True)
class UnsplitDataset:
    """Labeled images by the splits that the source assigns; without ``has_splits`` all are in ``train``.

    Without test, val is the test split.
    """

    name: str
    source: str
    classes: Sequence[str]
    images: Mapping[Split, Sequence[Image]]
    has_splits: bool = False
    skipped: Sequence[Skipped] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    task: TaskName = "classification"
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if "val" in self.images and "test" not in self.images:
            renamed: dict[Split, Split] = {"val": "test"}
            images = {renamed.get(split, split): images for split, images in self.images.items()}
            object.__setattr__(self, "images", images)

    def split(self, val_fraction: float | None = None, copies: Copies | None = None) -> ImageSet:
        """Assign every image to one split.

        If the source assigns ``train`` alone, 10 % become test and ``val_fraction`` (default 10 %) val; with
        ``train`` and ``test``, val is held out of train; all three are kept. Content that the source assigns
        to several splits stays in the last of train, val and test. Content with several classes goes to train
        if we split. Unless each image has one class, only train must contain every class. Near ``copies``
        with the same labels stay together if we split and a class has enough other images. In test, copies
        count once.

        Raises:
            UsageError: fewer than two classes, or a class too small for the splits.
        """
        copies = copies or Copies()
        fraction = VAL_FRACTION if val_fraction is None else val_fraction
        if len(self.classes) < (1 if self.task == "detection" else 2):
            classes = f"only one class, '{self.classes[0]}'" if self.classes else "no classes"
            raise UsageError(f"{self.source}: it has {classes}. Provide images of two or more classes.")
        assigned = {split: list(self.images.get(split, ())) for split in SPLITS}
        splits, removed = _remove_copies(assigned, copies)
        has_test, notes = "test" in self.images, list(self.notes)
        if "val" not in self.images:
            split_train = _split_by_class if self.task == "classification" else _split_multi_label
            units = _choose_units(splits["train"], copies, 2 if has_test else 3)
            splits |= split_train(splits["train"], self.classes, fraction, units, test=not has_test)
        elif fraction != VAL_FRACTION:
            notes.append(f"no effect of --val-fraction {fraction:g}: the data has a val split")
        splits["test"], repeated = drop_repeated(splits["test"], copies)
        for image in repeated:
            removed[copies.content(image)].append(image)
        _check_every_class(splits, self.classes, SPLITS if self.task == "classification" else ("train",))
        sorted_splits = {split: sort_images(splits[split]) for split in SPLITS}
        return ImageSet(
            name=self.name,
            source=self.source,
            classes=tuple(self.classes),
            train=sorted_splits["train"],
            val=sorted_splits["val"],
            test=sorted_splits["test"],
            skipped=tuple(self.skipped),
            duplicates=_find_duplicates(sorted_splits, removed, copies),
            leaks=_find_leaks(sorted_splits, copies),
            ignored=dict(self.ignored),
            notes=tuple(notes),
            task=self.task,
        )


def _remove_copies(
    images: dict[Split, list[Image]], copies: Copies
) -> tuple[dict[Split, list[Image]], dict[str, list[Image]]]:
    """Remove content from a split if a later split contains it; also return what was removed, by key."""
    removed: dict[str, list[Image]] = defaultdict(list)
    seen: set[str] = set()
    splits: dict[Split, list[Image]] = {}
    for split in reversed(SPLITS):
        splits[split] = []
        for image in images[split]:
            content = copies.content(image)
            (removed[content] if content in seen else splits[split]).append(image)
        seen.update(map(copies.content, images[split]))
    return splits, removed


def drop_repeated(images: Iterable[Image], copies: Copies) -> tuple[list[Image], list[Image]]:
    """Return the first image of each content and labels, and the others."""
    kept: dict[tuple[str, tuple[int, ...]], Image] = {}
    repeated = []
    for image in sort_images(tuple(images)):
        if kept.setdefault((copies.content(image), image.labels), image) is not image:
            repeated.append(image)
    return list(kept.values()), repeated


def _choose_units(images: Sequence[Image], copies: Copies, least: int) -> dict[str, str]:
    """Return what is split, by key: the group of an image's near copies.

    A class with fewer than ``least`` groups is split by content. Groups that are large parts of a class come
    last in the order, and so stay in train.
    """
    contents: dict[str, set[str]] = defaultdict(set)
    labels: dict[str, set[int]] = defaultdict(set)
    sizes: Counter[int] = Counter()
    for image in images:
        group = copies.group(image)
        contents[group].add(copies.content(image))
        labels[group].update(image.labels or (NO_CLASS,))
    groups = Counter(label for group in labels for label in labels[group])
    for group, label_set in labels.items():
        sizes.update(dict.fromkeys(label_set, len(contents[group])))
    units = {}
    for image in images:
        group = copies.group(image)
        if any(groups[label] < least for label in labels[group]):
            units[image.key] = copies.content(image)
        else:
            largest = max(1.0, TEST_FRACTION * min(sizes[label] for label in labels[group]))
            units[image.key] = f"~{group}" if len(contents[group]) > largest else group
    return units


def _split_by_class(
    images: list[Image], classes: Sequence[str], fraction: float, units: Mapping[str, str], *, test: bool
) -> dict[Split, list[Image]]:
    """Split off val, and test if ``test``: the first of each class in the order of content hashes."""
    if fraction == 0 and not test:
        return {"train": images, "val": []}
    labels: dict[str, set[int]] = defaultdict(set)
    for image in images:
        labels[units[image.key]].add(image.label)
    keys_of: dict[int, list[str]] = defaultdict(list)
    for key in sorted(key for key in labels if len(labels[key]) == 1):
        keys_of[next(iter(labels[key]))].append(key)
    # Content with several classes stays in train.
    ambiguous = {label for label_set in labels.values() if len(label_set) > 1 for label in label_set}
    split_of: dict[str, Split] = dict.fromkeys(labels, "train")
    for label, name in enumerate(classes):
        keys, in_train = keys_of[label], label in ambiguous
        if not keys or len(keys) + in_train < (3 if test else 2):
            required = "train, val and test require 3" if test else "train and val require 2"
            advice = "" if test else ", or use --val-fraction 0"
            raise UsageError(
                f"Class '{name}' has {_describe_count(len(keys), label, images)}, but {required}. "
                f"Add images{advice}."
            )
        tested = count_held_out(len(keys), TEST_FRACTION, len(keys) - 2) if test else 0
        # Val follows test, so that the test split does not depend on the val fraction.
        validated = count_held_out(len(keys), fraction, len(keys) - tested - (not in_train))
        split_of |= dict.fromkeys(keys[:tested], "test")
        if fraction > 0:
            split_of |= dict.fromkeys(keys[tested : tested + validated], "val")
    return _group(images, split_of, units, test=test)


def count_held_out(count: int, fraction: float, limit: int) -> int:
    """Return how many of ``count`` images are held out: the fraction, but at least one."""
    return min(max(1, round(count * fraction)), max(1, limit))


def _split_multi_label(
    images: list[Image], classes: Sequence[str], fraction: float, units: Mapping[str, str], *, test: bool
) -> dict[Split, list[Image]]:
    """Split off val, and test if ``test``, in proportion to each class.

    At least one image of each class is held out for a split if it can be spared: two stay for val and train
    after test, one stays in train after val. Content with several sets of labels goes to train.
    """
    sets: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for image in images:
        sets[units[image.key]].add(image.labels)
    labels_of = {key: next(iter(label_sets)) for key, label_sets in sets.items() if len(label_sets) == 1}
    counts = Counter(label for label_sets in sets.values() for label in set().union(*label_sets))
    split_of: dict[str, Split] = dict.fromkeys(sets, "train")
    if test:
        tested = _choose_held_out(labels_of, counts, TEST_FRACTION, 2)
        if not tested:
            raise UsageError(
                f"None of the {len(classes)} classes has 3 different images, which train, val and test "
                "require. Add images."
            )
        split_of |= dict.fromkeys(tested, "test")
        counts -= Counter(label for key in tested for label in labels_of[key])
        labels_of = {key: labels for key, labels in labels_of.items() if key not in tested}
        # A fraction of all images, not of the remaining ones.
        fraction = min(1.0, fraction / (1 - TEST_FRACTION))
    if fraction > 0:
        split_of |= dict.fromkeys(_choose_held_out(labels_of, counts, fraction, 1), "val")
    return _group(images, split_of, units, test=test)


def _choose_held_out(
    labels_of: Mapping[str, tuple[int, ...]], counts: Mapping[int, int], fraction: float, stay: int
) -> set[str]:
    """Return the keys of images to hold out: a fraction of each class, at least one, while ``stay`` remain.

    ``labels_of`` maps keys to classes; ``counts`` includes images that may not be held out.
    """
    keys_of: dict[int, list[str]] = defaultdict(list)
    for key in sorted(labels_of):
        for label in labels_of[key] or (NO_CLASS,):
            keys_of[label].append(key)
    left = {**counts, NO_CLASS: len(keys_of.get(NO_CLASS, ())) + stay}
    held: Counter[int] = Counter()
    taken: set[str] = set()
    for label in sorted(keys_of, key=lambda label: (len(keys_of[label]), label)):
        wanted = count_held_out(len(keys_of[label]), fraction, left[label] - stay)
        for key in keys_of[label]:
            if held[label] >= wanted:
                break
            labels = labels_of[key] or (NO_CLASS,)
            if key not in taken and all(left[other] > stay for other in labels):
                taken.add(key)
                for other in labels:
                    held[other] += 1
                    left[other] -= 1
    return taken


def _group(
    images: Iterable[Image], split_of: Mapping[str, Split], units: Mapping[str, str], *, test: bool
) -> dict[Split, list[Image]]:
    splits: dict[Split, list[Image]] = {split: [] for split in SPLITS if test or split != "test"}
    for image in images:
        splits[split_of[units[image.key]]].append(image)
    return splits


def _describe_count(count: int, label: int, images: Sequence[Image]) -> str:
    """Return a class's number of different images, and of its files if there are more."""
    files = sum(image.label == label for image in images)
    if count == 0:
        return "only images that also have other classes" if files else "no images"
    different = "one image" if count == 1 else f"{count} different images"
    return different if files <= count else f"{different} in {files} files"


def _check_every_class(
    splits: Mapping[Split, Sequence[Image]], classes: Sequence[str], required: Sequence[Split]
) -> None:
    for split in required:
        if split == "val" and not splits[split]:
            continue
        present = {label for image in splits[split] for label in image.labels}
        if missing := [name for label, name in enumerate(classes) if label not in present]:
            raise UsageError(
                f"The {split} split has no image of {quote_names(missing)} that is not in another split as "
                "well. Add images."
            )


def _find_leaks(splits: Mapping[Split, Sequence[Image]], copies: Copies) -> tuple[Leak, ...]:
    """Return the groups of near copies that are in several splits."""
    groups: dict[str, dict[Split, list[str]]] = defaultdict(dict)
    for split in SPLITS:
        for image in splits[split]:
            if image.key in copies.near:
                groups[copies.group(image)].setdefault(split, []).append(image.name)
    leaks = (
        Leak(tuple(sorted(chain(*names.values()))), len(names.get("test", ())))
        for names in groups.values()
        if len(names) > 1
    )
    return tuple(sorted(leaks, key=lambda leak: leak.names))


def _find_duplicates(
    splits: Mapping[Split, Sequence[Image]], removed: dict[str, list[Image]], copies: Copies
) -> tuple[Duplicate, ...]:
    by_content: dict[str, list[tuple[Split, Image]]] = defaultdict(list)
    for split in SPLITS:
        for image in splits[split]:
            by_content[copies.content(image)].append((split, image))
    duplicates = []
    for key, kept in by_content.items():
        images = [*removed.get(key, ()), *(image for _, image in kept)]
        two_classes = len({image.labels for image in images}) > 1
        if key in removed or two_classes:
            names = tuple(sorted(image.name for image in images))
            removed_names = tuple(sorted(image.name for image in removed.get(key, ())))
            duplicates.append(Duplicate(names, kept[0][0], removed_names, two_classes))
    return tuple(sorted(duplicates, key=lambda duplicate: duplicate.names))


def quote_names(names: Sequence[str], limit: int = 5) -> str:
    """Return names such as 'a', 'b' and 3 more."""
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
