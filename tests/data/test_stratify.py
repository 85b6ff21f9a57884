"""Multi-label sets are split in proportion to each class, by content alone."""

import hashlib

import numpy as np
import pytest
from questpress.pipeline.data.dataset import SPLITS, Image, ImageSet
from questpress.pipeline.data.splits import UnsplitDataset
from questpress.pipeline.errors import UsageError


def image(number: int, *labels: int, name: str = "") -> Image:
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Image.with_labels(name or str(number), labels, key, b"")


def many(count: int, shares: list[float], seed: int = 0) -> list[Image]:
    shown = np.random.default_rng(seed).random((count, len(shares))) < shares
    return [image(n, *np.flatnonzero(row).tolist()) for n, row in enumerate(shown)]


def split(images: list[Image], classes: int, fraction: float | None = None) -> ImageSet:
    names = [str(label) for label in range(classes)]
    return UnsplitDataset("x", "x", names, {"train": images}, task="multi-label").split(fraction)


def test_each_class_is_held_out_in_proportion() -> None:
    data = split(many(2000, [0.5, 0.2, 0.05, 0.01]), 4)
    for label in range(4):
        whole = sum(data.counts[role][label] for role in SPLITS)
        for role in ("val", "test"):
            assert data.counts[role][label] == pytest.approx(0.1 * whole, abs=max(2, 0.02 * whole))
    assert len(data.test) == pytest.approx(200, rel=0.1) and len(data.val) == pytest.approx(200, rel=0.1)


def test_images_without_classes_are_held_out_as_well() -> None:
    data = split([*many(300, [0.4, 0.3]), *(image(1000 + n) for n in range(100))], 2)
    empty = {role: sum(not member.labels for member in data.split(role)) for role in SPLITS}
    assert empty["test"] == pytest.approx(0.1 * sum(empty.values()), abs=2)
    assert empty["val"] == pytest.approx(0.1 * sum(empty.values()), abs=2)


def test_splits_depend_on_content_only() -> None:
    images = many(300, [0.4, 0.2, 0.1])
    again = [
        Image.with_labels(f"other {member.name}", member.labels, member.key, b"") for member in images[::-1]
    ]
    assert split(images, 3).fingerprint == split(again, 3).fingerprint
    tested = {member.key for member in split(images, 3).test}
    assert tested == {member.key for member in split(images, 3, 0.3).test}


def test_every_class_stays_in_train_and_a_rare_one_is_still_tested() -> None:
    images = [*many(100, [0.5, 0.4, 0, 0]), image(900, 0, 2), image(901, 2), image(902, 1, 2), image(903, 3)]
    counts = split(images, 4).counts
    assert [counts[role][2] for role in SPLITS] == [1, 1, 1]
    assert [counts[role][3] for role in SPLITS] == [1, 0, 0]


def test_content_with_two_label_sets_goes_to_train() -> None:
    images = many(100, [0.5, 0.4])
    twice = [image(n, 0, name=f"a{n}") for n in range(100)]
    data = split([*images, *twice], 2)
    torn = {member.key for member in images if member.labels != (0,)}
    assert torn <= {member.key for member in data.train}
    assert sum(group.two_classes for group in data.duplicates) == len(torn)


def test_test_split_of_the_source_is_kept() -> None:
    images = many(200, [0.5, 0.4])
    splits = {"train": images[:150], "test": images[150:]}
    data = UnsplitDataset("x", "x", ["0", "1"], splits, task="multi-label").split(None)
    assert {member.key for member in data.test} == {member.key for member in images[150:]}
    assert len(data.val) == pytest.approx(15, abs=3)


def test_too_few_images_for_three_splits_are_refused() -> None:
    with pytest.raises(UsageError, match="has 3 different images"):
        split([image(0, 0), image(1, 1), image(2, 0, 1)][:2], 2)
