import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questpress.pipeline.data.dataset import SPLITS, Image, ImageSet
from questpress.pipeline.data.splits import UnsplitDataset
from questpress.pipeline.errors import UsageError


def image(label: int, content: int | str, name: str = "") -> Image:
    key = hashlib.sha256(str(content).encode()).hexdigest()
    return Image(name or f"{label}/{content}", label, key, b"")


def split(images: list[Image], classes: int, fraction: float | None = None) -> ImageSet:
    return UnsplitDataset("set", "set", [str(c) for c in range(classes)], {"train": images}).split(fraction)


def split_of(images: ImageSet) -> dict[str, str]:
    return {member.key: role for role in SPLITS for member in images.split(role)}


# Contents overlap on purpose: copies within a class, and the same content under two classes.
sets = st.lists(st.lists(st.integers(0, 60), min_size=8, max_size=40), min_size=2, max_size=4)


@given(sets, st.sampled_from([None, 0.05, 0.3, 0.9]))
@settings(max_examples=60, deadline=None)
def test_no_image_is_in_two_splits_and_every_class_is_in_all(contents: list[list[int]], fraction) -> None:
    images = [image(label, content) for label, members in enumerate(contents) for content in members]
    labels: dict[str, set[int]] = {}
    for member in images:
        labels.setdefault(member.key, set()).add(member.label)
    for label in range(len(contents)):
        exclusive = sum(classes == {label} for classes in labels.values())
        is_ambiguous = any(label in classes and len(classes) > 1 for classes in labels.values())
        if exclusive + is_ambiguous < 3:
            with pytest.raises(UsageError):
                split(images, len(contents), fraction)
            return
    done = split(images, len(contents), fraction)
    in_test = [(member.key, member.label) for member in done.test]
    assert len(in_test) == len(set(in_test))  # copies in test count once
    removed = sum(len(group.removed) for group in done.duplicates)
    assert len(done) + removed == len(images)
    keys = [{member.key for member in done.split(role)} for role in SPLITS]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert all(min(counts) >= 1 for counts in done.counts.values())


@given(st.integers(3, 300), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_additional_image_moves_only_images_at_the_boundaries(count: int, new: int) -> None:
    others = [image(1, f"other {n}") for n in range(20)]
    images = [image(0, f"old {n}") for n in range(count)] + others
    before = split_of(split(images, 2))
    after = split_of(split([*images, image(0, f"new {new}")], 2))
    moved = [key for key, role in before.items() if after[key] != role]
    assert len(moved) <= 3
    assert not any(other.key in moved for other in others)


def test_names_and_order_of_the_files_do_not_matter() -> None:
    images = [image(label, f"{label} {n}") for label in range(3) for n in range(30)]
    renamed = [Image(f"z{n}", member.label, member.key, b"") for n, member in enumerate(images)]
    random.Random(0).shuffle(renamed)
    first, second = split(images, 3), split(renamed, 3)
    assert first.fingerprint == second.fingerprint
    assert [member.key for member in first.train] == [member.key for member in second.train]


def test_hundred_images_are_split_80_10_10() -> None:
    done = split([image(label, f"{label} {n}") for label in range(2) for n in range(100)], 2)
    assert done.counts == {"train": [80, 80], "val": [10, 10], "test": [10, 10]}


def test_test_split_is_independent_of_the_val_fraction() -> None:
    images = [image(label, f"{label} {n}") for label in range(2) for n in range(40)]
    sets_of_tests = {
        tuple(member.key for member in split(images, 2, fraction).test) for fraction in (None, 0, 0.3)
    }
    assert len(sets_of_tests) == 1
    without = split(images, 2, 0)
    assert without.val == () and len(without.train) == 72


def test_copies_stay_together_and_content_under_two_classes_trains() -> None:
    images = [image(label, f"{label} {n}") for label in range(2) for n in range(20)]
    images += [image(0, "0 3", name="copy")] * 5
    torn = [image(0, "torn", "cats/torn"), image(1, "torn", "dogs/torn")]
    done = split(images + torn, 2)
    assert {split_of(done)[member.key] for member in torn} == {"train"}
    (duplicate,) = done.duplicates
    assert duplicate.names == ("cats/torn", "dogs/torn") and duplicate.two_classes and not duplicate.removed


def test_duplicates_of_test_images_leave_train() -> None:
    train = [image(label, f"{label} {n}", f"train/{label}/{n}") for label in range(2) for n in range(10)]
    test = [
        image(0, "0 4", "test/0/4"),
        image(0, "t", "test/0/t"),
        image(1, "0 5", "test/1/5"),
        image(1, "t1", "test/1/t1"),
    ]
    done = UnsplitDataset("set", "set", ["a", "b"], {"train": train, "test": test}).split(0)
    assert done.counts == {"train": [8, 10], "val": [0, 0], "test": [2, 2]}
    assert [(d.names, d.kept, d.removed, d.two_classes) for d in done.duplicates] == [
        (("test/0/4", "train/0/4"), "test", ("train/0/4",), False),
        (("test/1/5", "train/0/5"), "test", ("train/0/5",), True),
    ]


@pytest.mark.parametrize("change", ["content", "label", "role", "class"])
def test_fingerprint_changes_with_any_content_class_or_split(change: str) -> None:
    def roles(changed: str = "") -> ImageSet:
        train = [image(0, "a"), image(1, "b"), image(0, "other" if changed == "content" else "c")]
        train.append(image(1 if changed == "label" else 0, "d"))
        val, test = [image(0, "e"), image(1, "f")], [image(0, "g"), image(1, "h")]
        (val if changed == "role" else train).append(image(0, "i"))
        classes = ["a", "z" if changed == "class" else "b"]
        return UnsplitDataset("set", "set", classes, {"train": train, "val": val, "test": test}).split(None)

    assert roles().fingerprint == roles().fingerprint
    assert roles(change).fingerprint != roles().fingerprint


def test_class_without_remaining_training_images_is_refused() -> None:
    train = [image(0, n) for n in range(9)] + [image(1, "x")]
    with pytest.raises(UsageError, match="The train split has no image of '1'"):
        UnsplitDataset(
            "set", "set", ["0", "1"], {"train": train, "test": [image(0, "t"), image(1, "x")]}
        ).split(0)
