import os
from pathlib import Path

import pytest
from questpress.pipeline.data.dataset import SPLITS
from questpress.pipeline.data.sources.folders import describe_unused_splits
from questpress.pipeline.errors import UsageError

from tests.support.pictures import folder, open_folder, save


def refused(path: Path, **options: float) -> str:
    with pytest.raises(UsageError) as caught:
        open_folder(path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert caught.value.exit_code == 2
    return sentence


def test_class_folders_alone_are_split_with_every_class_in_every_split(tmp_path: Path) -> None:
    images = open_folder(folder(tmp_path / "pets", {"dog": 20, "cat": 30}))
    assert images.name == "pets" and images.classes == ("cat", "dog")
    assert images.counts == {"train": [24, 16], "val": [3, 2], "test": [3, 2]}
    assert all(not Path(image.name).is_absolute() for role in SPLITS for image in images.split(role))


def test_classes_are_sorted_as_torchvision_sorts_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder(tmp_path, dict.fromkeys(("b", "B", "10", "9", "ä", "a b", "test"), 3))
    assert list(open_folder(tmp_path).classes) == ImageFolder(tmp_path).classes


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "testing"), ("train", "valid")])
def test_second_of_two_folders_is_the_test_split(tmp_path: Path, train: str, test: str) -> None:
    folder(tmp_path, {f"{train}/a": 20, f"{train}/b": 20, f"{test}/a": 4, f"{test}/b": 5})
    images = open_folder(tmp_path)
    assert images.counts == {"train": [18, 18], "val": [2, 2], "test": [4, 5]}
    assert all(image.name.startswith(test) for image in images.test)
    assert open_folder(tmp_path, val_fraction=0).counts["train"] == [20, 20]


def test_three_split_folders_are_kept(tmp_path: Path) -> None:
    folder(tmp_path, {f"{role}/{c}": n for role, n in (("train", 5), ("val", 1), ("test", 2)) for c in "ab"})
    images = open_folder(tmp_path, val_fraction=0.4)
    assert images.counts == {"train": [5, 5], "val": [1, 1], "test": [2, 2]}
    assert images.notes == ("no effect of --val-fraction 0.4: the data has a val split",)


def test_train_alone_is_the_whole_set(tmp_path: Path) -> None:
    folder(tmp_path, {"train/a": 10, "train/b": 10})
    assert open_folder(tmp_path).counts == {"train": [8, 8], "val": [1, 1], "test": [1, 1]}


def test_class_may_be_called_test_without_a_train_folder(tmp_path: Path) -> None:
    assert open_folder(folder(tmp_path, {"test": 3, "other": 3})).classes == ("other", "test")


def test_nested_folders_count_and_hidden_and_other_files_do_not(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3, "a/deep/deeper": 2, ".git": 1})
    save(tmp_path / "b/.hidden.png", 90)
    save(tmp_path / "b/upper.PNG", 91)
    (tmp_path / "b/notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    images = open_folder(tmp_path)
    assert len(images) == 9 and images.ignored == {"hidden": 2, ".txt": 1, "without an extension": 1}
    assert images.notes == ("ignored files: 2 hidden, 1 .txt, 1 without an extension",)
    assert any(image.name.startswith("a/deep/deeper/") for role in SPLITS for image in images.split(role))


def test_links_that_lead_out_are_not_followed_and_a_linked_root_is(tmp_path: Path) -> None:
    root = folder(tmp_path / "real", {"a": 4, "b": 4})
    outside = save(tmp_path / "outside/secret.png", 99)
    (root / "a/out.png").symlink_to(outside)
    (root / "b/dir").symlink_to(outside.parent)
    (root / "a/inside.png").symlink_to(root / "b/0.png")
    (root / "a/broken.png").symlink_to(root / "nothing")
    (root / "b/loop").symlink_to(root / "b")
    (tmp_path / "linked").symlink_to(root)
    images = open_folder(tmp_path / "linked")
    assert {(file.name, file.reason.split(" to ")[0]) for file in images.skipped} == {
        ("a/out.png", "a link that leads out of the data folder"),
        ("b/dir", "a link that leads out of the data folder"),
        ("a/broken.png", "a broken link"),
        ("b/loop", "a link"),
    }
    assert len(images) == 9 and images.name == "real"


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    strange = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    try:
        Path(os.fsdecode(strange)).write_bytes(save(tmp_path / "x.png", 50).read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    images = open_folder(tmp_path)
    names = [image.name for role in SPLITS for image in images.split(role)]
    assert "a/caf\\xe9.png" in names
    assert "\n".join(names).encode("utf-8")
    (image,) = [image for role in SPLITS for image in images.split(role) if "caf" in image.name]
    assert image.read() == (tmp_path / "x.png").read_bytes()


def test_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert "is not a folder" in refused(save(tmp_path / "one.png", 0))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no class folders"),
        ({"a": 0, "b": 0}, "contain no images"),
        ({"a": 5, "b": 0, "c": 5}, "Class 'b' has no image"),
        ({"a": 5}, "only one class, 'a'"),
        ({"": 5}, "images but no class folders"),
        ({"train": 5, "test": 5}, "images but no class folders"),
        ({"train/a": 3, "train/b": 3, "val/a": 3, "val/b": 0}, "only 'train' has images of 'b'"),
        ({"val/a": 3, "val/b": 3, "test/a": 3, "test/b": 3}, "no 'train' folder"),
        ({f"{role}/{c}": 3 for role in ("train", "val", "validation") for c in "ab"}, "are the same split"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    assert message in refused(folder(tmp_path, counts))


def test_classes_that_differ_between_train_and_val_are_named(tmp_path: Path) -> None:
    folder(tmp_path, {"train/cat": 3, "train/dog": 3, "val/cat": 3, "val/hound": 3})
    sentence = refused(tmp_path)
    assert "only 'train' has images of 'dog'" in sentence and "only 'val' has images of 'hound'" in sentence


def test_fewer_than_three_different_images_in_a_class_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 5, "b": 2})
    (tmp_path / "b/copy.png").write_bytes((tmp_path / "b/0.png").read_bytes())
    message = "Class 'b' has 2 different images in 3 files, but train, val and test require 3"
    assert message in refused(tmp_path)


def test_class_with_only_shared_images_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 5, "b": 1})
    (tmp_path / "b/0.png").write_bytes((tmp_path / "a/0.png").read_bytes())
    assert "Class 'b' has only images that also have other classes" in refused(tmp_path)


def test_folder_one_level_too_high_suggests_the_inner_one(tmp_path: Path) -> None:
    folder(tmp_path / "photos", {f"{role}/{c}": 3 for role in ("train", "test") for c in "ab"})
    warning = f"{tmp_path} contains one folder with further folders. Use --data {tmp_path / 'photos'}."
    assert warning in refused(tmp_path)


def test_folder_one_level_too_low_is_reported(tmp_path: Path) -> None:
    folder(tmp_path, {f"{role}/{c}": 3 for role in ("train", "val", "test") for c in "ab"})
    warning = f"not used, although next to train: 'val', 'test'; use --data {tmp_path} for all of them"
    assert describe_unused_splits(tmp_path / "train") == warning
    assert describe_unused_splits(tmp_path) is None and describe_unused_splits(tmp_path / "train/a") is None
    folder(tmp_path / "alone", {"train/a": 3, "train/b": 3})
    assert describe_unused_splits(tmp_path / "alone/train") is None


def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b").chmod(0)
    try:
        if os.access(tmp_path / "b", os.R_OK):
            pytest.skip("this user may read everything")
        assert "b cannot be read. Check its permissions" in refused(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o755)


def test_hashing_reports_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_folder(folder(tmp_path, {"a": 3, "b": 4}), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 7) for n in range(1, 8)]
