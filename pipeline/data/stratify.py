"""Roles for images of several classes. Like ``split``, the answer depends on content alone.

The greedy idea of iterative stratification (Sechidis, Tsoumakas, Vlahavas: "On the Stratification of
Multi-Label Data", ECML PKDD 2011), with a hash in the place of chance: classes are served from the rarest to
the commonest, since an image taken for a rare class serves its common ones too, and not the other way round.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ..errors import UsageError
from .dataset import Image, Role
from .shares import TEST_FRACTION, share

NO_CLASS = -1
"""Images of no class are held out like those of a class."""


def split_sets(
    images: Sequence[Image], classes: Sequence[str], fraction: float, *, test: bool
) -> dict[Role, list[Image]]:
    """``images`` as train and select, and with ``test`` as test too; in proportion to each class.

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
    role_of: dict[str, Role] = dict.fromkeys(sets, "train")
    if test:
        tested = held_out(agreed, counts, TEST_FRACTION, 2)
        if not tested:
            raise UsageError(
                f"None of the {len(classes)} classes has three different images; three or more of a class "
                "are needed, so that one each can train, select and test."
            )
        role_of.update(dict.fromkeys(tested, "test"))
        agreed = {key: labels for key, labels in agreed.items() if key not in tested}
        counts -= Counter(label for key in tested for label in next(iter(sets[key])))
        # Of all images, not of those that are left.
        fraction = min(1.0, fraction / (1 - TEST_FRACTION))
    if fraction > 0:
        role_of.update(dict.fromkeys(held_out(agreed, counts, fraction, 1), "select"))
    roles: dict[Role, list[Image]] = {"train": [], "select": []}
    if test:
        roles["test"] = []
    for image in images:
        roles[role_of[image.key]].append(image)
    return roles


def held_out(
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
        wanted = share(len(of_class[label]), fraction, left[label] - least)
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
