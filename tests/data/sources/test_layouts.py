"""Folders: splits under other names, folders that are no split, links, and files that are ignored."""

import unicodedata
from pathlib import Path

import pytest
from PIL import Image as PillowImage
from questpress.pipeline.data.dataset import ImageSet
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.data.sources.folders import describe_ignored
from questpress.pipeline.data.sources.split_names import find_splits
from questpress.pipeline.errors import UsageError

from tests.support.pictures import folder, pixels, save


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UsageError) as error:
        open_data(str(path))
    assert str(error.value).endswith(".")
    for word in words:
        assert word in str(error.value), error.value


def sizes(data: ImageSet) -> dict[str, int]:
    return {split: len(data.split(split)) for split in ("train", "val", "test")}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["test_set", "training_set"], {"training_set": "train", "test_set": "test"}),
        (["train_images", "validation"], {"train_images": "train", "validation": "val"}),
        (["seg_pred", "seg_test", "seg_train"], {"seg_train": "train", "seg_test": "test"}),
        (["TestImages", "TrainImages"], {"TrainImages": "train", "TestImages": "test"}),
        (["train2017", "val2017"], {"train2017": "train", "val2017": "val"}),
        (["Testset", "Trainset"], {"Trainset": "train", "Testset": "test"}),
        (["freight_train", "steam_train"], {}),
        (["bus", "toy_train", "training_shoes"], {}),
        (["cat_test", "cat_val"], {}),
    ],
)
def test_names_of_splits_are_recognized(names: list[str], splits: dict[str, str]) -> None:
    assert find_splits(names) == splits


@pytest.mark.parametrize(
    ("train", "test"), [("training_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test")]
)
def test_split_folders_of_other_names_are_splits(tmp_path: Path, train: str, test: str) -> None:
    folder(tmp_path, {f"{train}/cat": 10, f"{train}/dog": 10, f"{test}/cat": 4, f"{test}/dog": 4})
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog") and sizes(data) == {"train": 18, "val": 2, "test": 8}


def test_split_folders_inside_class_folders_are_splits(tmp_path: Path) -> None:
    folder(tmp_path, {f"{c}/{split}": n for c in ("cat", "dog") for split, n in (("train", 9), ("test", 3))})
    data = open_data(str(tmp_path), val_fraction=0)
    assert data.classes == ("cat", "dog") and sizes(data) == {"train": 18, "val": 0, "test": 6}
    assert all("/test/" in image.name for image in data.test)


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("bus", "car", "tram")])
def test_folders_that_contain_the_same_folders_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    counts = {f"{name}/{inner}": 4 for name in names for inner in ("2019", "2020")}
    folder(tmp_path, counts)
    refused(tmp_path, f"'{names[0]}', '{names[1]}'", "'2019', '2020'", "named train")
    folder(tmp_path / "again", {f"train/{name}": count for name, count in counts.items()})
    assert open_data(str(tmp_path / "again")).classes == names  # as the message advises


def test_images_next_to_the_splits_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, {f"{name}/{year}": 4 for name in ("bus", "car", "train") for year in (2019, 2020)})
    refused(tmp_path, "'bus', 'car': images next to 'train' that are no split", "new folder named train")


def test_folder_without_images_next_to_the_splits_is_reported(tmp_path: Path) -> None:
    folder(tmp_path, {"train/a": 5, "train/b": 5, "docs": 0})
    assert [(file.name, file.reason) for file in open_data(str(tmp_path)).skipped] == [
        ("docs", "it is next to 'train' and contains no images")
    ]


def test_class_may_be_called_train_among_others(tmp_path: Path) -> None:
    folder(tmp_path, {"bus": 4, "car": 4, "train": 4})
    assert open_data(str(tmp_path)).classes == ("bus", "car", "train")


def test_class_names_of_other_unicode_forms_are_equal(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder(tmp_path, {f"train/{composed}": 5, "train/b": 5, f"test/{decomposed}": 2, "test/b": 2})
    data = open_data(str(tmp_path))
    assert data.classes == ("b", composed) and data.counts["test"] == [2, 2]


@pytest.mark.parametrize("suffix", [".avif", ".jp2", ".tga"])
def test_every_format_that_pillow_decodes_is_read(tmp_path: Path, suffix: str) -> None:
    folder(tmp_path, {"cat": 3, "dog": 0})
    for number in range(4):
        PillowImage.fromarray(pixels(50 + number, 32, 32)).save(tmp_path / f"dog/{number}{suffix}")
    data = open_data(str(tmp_path))
    assert len(data) == 7 and not data.ignored and not data.notes


def test_ignored_files_are_counted_by_suffix_and_named_in_errors(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 4, "dog": 0})
    for name in ("cat/a.txt", "cat/b.txt", "dog/a.xyz", "dog/b.xyz", "dog/c.xyz", "list"):
        (tmp_path / name).touch()
    save(tmp_path / "cover.png", 99)
    refused(
        tmp_path, "Class 'dog' has no images", "Ignored files: 3 .xyz, 2 .txt, 1 images outside of the class"
    )
    folder(tmp_path, {"dog": 4}, 30)
    ignored = {".xyz": 3, ".txt": 2, "without an extension": 1, "images outside of the class folders": 1}
    assert open_data(str(tmp_path)).ignored == ignored


def test_ignored_formats_name_the_package_that_reads_them() -> None:
    assert describe_ignored({".txt": 1, ".heic": 2000}) == (
        "2,000 .heic (pip install pillow-heif reads them), 1 .txt"
    )


def test_links_that_lead_out_are_followed_on_request(tmp_path: Path) -> None:
    store, root = folder(tmp_path / "store", {"a": 4, "b": 4}), tmp_path / "data"
    (root / "a").mkdir(parents=True)
    for file in (store / "a").iterdir():
        (root / "a" / file.name).symlink_to(file)
    (root / "b").symlink_to(store / "b")
    refused(root, "5 links that lead out", f"such as b to {store}/b", "--follow-links")
    data = open_data(str(root), follow_links=True)
    assert data.classes == ("a", "b") and len(data) == 8 and not data.skipped
    rows = [f"{name}/{number}.png,{name}" for name in "ab" for number in range(4)]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    refused(root / "labels.csv", "8 links that lead out", "--follow-links")
    assert len(open_data(str(root / "labels.csv"), follow_links=True)) == 8
