"""Who gets which role. The answer depends on content alone: not on names, places, order or a random state."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..runs.scores import TaskName
from .dataset import SPLITS, Duplicate, Image, ImageSet, Split, Skipped, sort_images

TEST_FRACTION = 0.1
VAL_FRACTION = 0.1


def count_held_out(count: int, fraction: float, most: int) -> int:
    """How many of ``count`` images a role gets: the fraction, but one at least."""
    return min(max(1, round(count * fraction)), max(1, most))


NO_CLASS = -1
"""Images of no class are held out like those of a class."""


def split_multi_label(
    images: Sequence[Image], classes: Sequence[str], fraction: float, *, test: bool
) -> dict[Split, list[Image]]:
    """``images`` as train and val, and with ``test`` as test too; in proportion to each class.

    A tenth is tested on, ``fraction`` selected on, of each class one image at least where it has one to
    spare: two stay for the roles after test, one stays in train. Content that is given with different classes
    goes to train.

    Raises:
        UsageError: no class has an image to spare for test.
    """
    sets: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for image in images:
        sets[image.key].add(image.labels)
    agreed = {key: next(iter(found)) for key, found in sets.items() if len(found) == 1}
    counts = Counter(label for key in sets for label in {label for one in sets[key] for label in one})
    role_of: dict[str, Split] = dict.fromkeys(sets, "train")
    if test:
        tested = choose_held_out(agreed, counts, TEST_FRACTION, 2)
        if not tested:
            raise UsageError(
                f"None of the {len(classes)} classes has three different images; three or more of a class "
                "are needed, so that one each can train, val and test."
            )
        role_of.update(dict.fromkeys(tested, "test"))
        agreed = {key: labels for key, labels in agreed.items() if key not in tested}
        counts -= Counter(label for key in tested for label in next(iter(sets[key])))
        # Of all images, not of those that are left.
        fraction = min(1.0, fraction / (1 - TEST_FRACTION))
    if fraction > 0:
        role_of.update(dict.fromkeys(choose_held_out(agreed, counts, fraction, 1), "val"))
    roles: dict[Split, list[Image]] = {"train": [], "val": []}
    if test:
        roles["test"] = []
    for image in images:
        roles[role_of[image.key]].append(image)
    return roles


def choose_held_out(
    contents: Mapping[str, tuple[int, ...]], counts: Mapping[int, int], fraction: float, least: int
) -> set[str]:
    """Keys of the contents taken out: of each class the fraction, but one at least, and ``least`` stay.

    Args:
        contents: classes by key.
        counts: images of each class in all, those that may not be taken out included.
    """
    of_class: dict[int, list[str]] = defaultdict(list)
    for key in sorted(contents):
        for label in contents[key] or (NO_CLASS,):
            of_class[label].append(key)
    left = {**counts, NO_CLASS: len(of_class.get(NO_CLASS, ())) + least}
    held: Counter[int] = Counter()
    taken: set[str] = set()
    for label in sorted(of_class, key=lambda label: (len(of_class[label]), label)):
        wanted = count_held_out(len(of_class[label]), fraction, left[label] - least)
        for key in of_class[label]:
            if held[label] >= wanted:
                break
            labels = contents[key] or (NO_CLASS,)
            if key not in taken and all(left[one] > least for one in labels):
                taken.add(key)
                for one in labels:
                    held[one] += 1
                    left[one] -= 1
    return taken


def check_val_fraction(fraction: float | None) -> float:
    """The fraction asked for, or the default.

    Raises:
        UsageError: it is not in [0, 1).
    """
    if fraction is None:
        return VAL_FRACTION
    if not 0 <= fraction < 1:
        raise UsageError(f"--val-fraction is {fraction:g}; give a number from 0 up to, but not including, 1.")
    return fraction


def assemble_splits(
    name: str,
    source: str,
    classes: Sequence[str],
    given: Mapping[Split, Sequence[Image]],
    val_fraction: float | None,
    skipped: Sequence[Skipped] = (),
    ignored: int = 0,
    *,
    task: TaskName = "classification",
) -> ImageSet:
    """Make an image set of what was given.

    ``given`` holds ``train`` alone (80/10/10 is split off by content), ``train`` and ``test`` (val is held
    out of train), or all three (taken as they are). Content never ends up in two roles: the later of train,
    val, test keeps it where it was given twice; content under two classes goes to train when we split.
    A multi-label set is split by ``split_sets``, and only its train split must have every class.

    Raises:
        UsageError: fewer than two classes, a class too small to be in every role, or a wrong fraction.
    """
    fraction = check_val_fraction(val_fraction)
    if len(classes) < 2:
        found = f"only one class, '{classes[0]}'" if classes else "no classes"
        raise UsageError(
            f"{source} has {found}; put the images of two or more classes into a folder for each."
        )
    roles, removed = _one_role_each({role: list(given.get(role, ())) for role in SPLITS})
    if task == "multi-label" and ("test" not in given or "val" not in given):
        roles = {**roles, **split_multi_label(roles["train"], classes, fraction, test="test" not in given)}
    elif "test" not in given:
        roles = _split_whole(roles["train"], classes, fraction)
    elif "val" not in given:
        roles = {**_hold_out(roles["train"], classes, fraction), "test": roles["test"]}
    _check_every_class(roles, classes, ("train",) if task == "multi-label" else SPLITS)
    ordered = {role: sort_images(roles[role]) for role in SPLITS}
    return ImageSet(
        name=name,
        source=source,
        classes=tuple(classes),
        **ordered,
        skipped=tuple(skipped),
        duplicates=_duplicates(ordered, removed),
        ignored=ignored,
        task=task,
    )


def _one_role_each(given: dict[Split, list[Image]]) -> tuple[dict[Split, list[Image]], dict[str, list[Image]]]:
    """Take content out of a role where a later role holds it too; also give what was taken out, by key."""
    removed: dict[str, list[Image]] = defaultdict(list)
    taken: set[str] = set()
    roles: dict[Split, list[Image]] = {}
    for role in reversed(SPLITS):
        roles[role] = []
        for image in given[role]:
            if image.key in taken:
                removed[image.key].append(image)
            else:
                roles[role].append(image)
        taken.update(image.key for image in given[role])
    return roles, removed


def _ranked(images: Sequence[Image]) -> tuple[list[list[str]], set[str]]:
    """Distinct content of each class by rank of its hash, and content that stands under two classes."""
    labels: dict[str, set[int]] = defaultdict(set)
    for image in images:
        labels[image.key].add(image.label)
    torn = {key for key, found in labels.items() if len(found) > 1}
    ranks: dict[int, list[str]] = defaultdict(list)
    for key in sorted(labels.keys() - torn):
        ranks[next(iter(labels[key]))].append(key)
    size = max((label for found in labels.values() for label in found), default=-1) + 1
    return [ranks[label] for label in range(size)], torn


def _split_whole(images: list[Image], classes: Sequence[str], fraction: float) -> dict[Split, list[Image]]:
    ranked, torn = _ranked(images)
    torn_labels = {image.label for image in images if image.key in torn}
    role_of: dict[str, Split] = dict.fromkeys(torn, "train")
    for label, name in enumerate(classes):
        keys = ranked[label] if label < len(ranked) else []
        if len(keys) + (label in torn_labels) < 3:
            raise UsageError(
                f"Class '{name}' has {_distinct(len(keys), label, images)}; three or more are needed, "
                "so that one each can train, val and test."
            )
        tested = count_held_out(len(keys), TEST_FRACTION, len(keys) - 2)
        # Select is ranked after test, so the test role is the same whatever fraction is asked for.
        selected = count_held_out(len(keys), fraction, len(keys) - tested - (label not in torn_labels))
        for rank, key in enumerate(keys):
            last: Split = "val" if fraction > 0 and rank < tested + selected else "train"
            role_of[key] = "test" if rank < tested else last
    return _by_role(images, role_of)


def _hold_out(images: list[Image], classes: Sequence[str], fraction: float) -> dict[Split, list[Image]]:
    if fraction == 0:
        return {"train": images, "val": []}
    ranked, torn = _ranked(images)
    torn_labels = {image.label for image in images if image.key in torn}
    role_of: dict[str, Split] = dict.fromkeys(torn, "train")
    for label, name in enumerate(classes):
        keys = ranked[label] if label < len(ranked) else []
        if len(keys) + (label in torn_labels) < 2 or not keys:
            raise UsageError(
                f"Class '{name}' has {_distinct(len(keys), label, images)} to train on; two are needed to "
                "hold one out for selecting (--val-fraction 0 holds none out)."
            )
        selected = count_held_out(len(keys), fraction, len(keys) - (label not in torn_labels))
        role_of.update((key, "val" if rank < selected else "train") for rank, key in enumerate(keys))
    return _by_role(images, role_of)


def _by_role(images: list[Image], role_of: dict[str, Split]) -> dict[Split, list[Image]]:
    roles: dict[Split, list[Image]] = {role: [] for role in SPLITS}
    for image in images:
        roles[role_of[image.key]].append(image)
    return roles


def _distinct(count: int, label: int, images: Sequence[Image]) -> str:
    """A class's images of different content, and its files where they are more."""
    files = sum(image.label == label for image in images)
    if count == 0:
        return "no image of its own" + (": all it has stands under other classes too" if files else "")
    told = "one image" if count == 1 else f"{count} different images"
    return told if files <= count else f"{told} in {files} files"


def _check_every_class(
    roles: Mapping[Split, Sequence[Image]], classes: Sequence[str], needed: Sequence[Split]
) -> None:
    for role in needed:
        if role == "val" and not roles[role]:
            continue
        present = {label for image in roles[role] for label in image.labels}
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing:
            raise UsageError(
                f"No image of {quote_names(missing)} is left for the role '{role}': what the folders hold "
                "of it stands in another role too; add images of it."
            )


def _duplicates(
    roles: Mapping[Split, Sequence[Image]], removed: dict[str, list[Image]]
) -> tuple[Duplicate, ...]:
    copies: dict[str, list[tuple[Split, Image]]] = defaultdict(list)
    for role in SPLITS:
        for image in roles[role]:
            copies[image.key].append((role, image))
    found = []
    for key, kept in copies.items():
        gone = removed.get(key, [])
        labels = {image.labels for image in [*gone, *(image for _, image in kept)]}
        if gone or len(labels) > 1:
            taken_out = tuple(sorted(image.name for image in gone))
            names = tuple(sorted([*taken_out, *(image.name for _, image in kept)]))
            found.append(Duplicate(names, kept[0][0], taken_out, len(labels) > 1))
    return tuple(sorted(found, key=lambda duplicate: duplicate.names))


def quote_names(names: Sequence[str], most: int = 5) -> str:
    """'a', 'b' and 3 more."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@dataclass(frozen=True)
class UnsplitDataset:
    """``images`` by the role they were given; without ``has_roles`` all are in train, and none has one."""

    name: str
    source: str
    classes: tuple[str, ...]
    images: Mapping[Split, Sequence[Image]]
    has_roles: bool
    skipped: tuple[Skipped, ...] = ()
    ignored: int = 0
    task: TaskName = "classification"

    def assembled(self, val_fraction: float | None) -> ImageSet:
        """The image set to learn from; see ``split.assemble``.

        Raises:
            UsageError: as ``split.assemble``.
        """
        return assemble_splits(
            self.name,
            self.source,
            self.classes,
            self.images,
            val_fraction,
            self.skipped,
            self.ignored,
            task=self.task,
        )
