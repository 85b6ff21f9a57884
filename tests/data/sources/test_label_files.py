"""Labels files: the data sets they describe, and errors about them."""

import csv
import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.data.dataset import ImageSet
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.errors import UsageError

from tests.support.pictures import save

CLASSES = ("cat", "dog", "fox")


def pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    return [save(folder / f"{n:03d}.png", first + n).name for n in range(count)]


def sets_of(count: int) -> list[list[str]]:
    """Return labels: one class for every third image, two for the others."""
    return [sorted({CLASSES[n % 3], CLASSES[(n * n + n // 3) % 3]}) for n in range(count)]


def table(folder: Path, rows: list[str], header: str = "file,labels", name: str = "labels.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder / name


def coco(path: Path, files: list[str], shown: list[list[str]], **more: Any) -> Path:
    """Annotations whose category numbers neither begin at 0 nor are in the order of the names."""
    number = {"fox": 1, "cat": 7, "dog": 90, "unseen": 3}
    annotations = [
        {"id": 10 * i + k, "image_id": 100 + i, "category_id": number[label], "segmentation": [[1, 2, 3]]}
        for i, labels in enumerate(shown)
        for k, label in enumerate([*labels, *labels])  # two boxes of a class are one label
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 100 + i, "file_name": file, "width": 16} for i, file in enumerate(files)],
        "annotations": annotations,
        "categories": [{"id": number[name], "name": name} for name in ("cat", "dog", "fox", "unseen")],
    } | more
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def by_name(data: ImageSet) -> dict[str, list[str]]:
    images = (*data.train, *data.val, *data.test)
    return {image.name: [data.classes[label] for label in image.labels] for image in images}


def refused(path: Path, *words: str, **more: Any) -> None:
    with pytest.raises(UsageError) as error:
        open_data(str(path), **more)
    assert str(error.value).endswith((".", ".)"))
    for word in words:
        assert word in str(error.value), error.value


def test_table_with_several_labels_makes_a_multi_label_set(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 40), sets_of(40)
    rows = [f"{name}, {' ; '.join(classes)};" for name, classes in zip(names, labels, strict=True)]
    data = open_data(str(table(tmp_path, rows)))
    assert data.task == "multi-label" and data.classes == CLASSES and data.name == tmp_path.name
    assert by_name(data) == dict(zip(names, labels, strict=True))
    for role in ("train", "val", "test"):
        assert all(data.counts[role])
    assert data.counts["train"][0] == sum("cat" in by_name(data)[image.name] for image in data.train)


def test_single_labels_make_the_same_set_as_class_folders(tmp_path: Path) -> None:
    names = pictures(tmp_path / "pool", 30)
    for n, name in enumerate(names):
        (tmp_path / "folders" / CLASSES[n % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "pool" / name, tmp_path / "folders" / CLASSES[n % 3] / name)
    path = table(tmp_path, [f"pool/{name},{CLASSES[n % 3]}" for n, name in enumerate(names)])
    from_table, from_folders = open_data(str(path)), open_data(str(tmp_path / "folders"))
    assert from_table.task == "classification"
    assert from_table.fingerprint == from_folders.fingerprint
    assert [image.key for image in from_table.train] == [image.key for image in from_folders.train]


def test_json_lines_and_tsv_equal_csv(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    pairs = list(zip(names, labels, strict=True))
    lines = [json.dumps({"image": name, "labels": classes}) for name, classes in pairs]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    comma = open_data(str(table(tmp_path, [f"{name},{';'.join(classes)}" for name, classes in pairs])))
    tab = open_data(
        str(table(tmp_path, [f"{';'.join(f)}\t{n}" for n, f in pairs], "Tags\tFilename", "a.tsv"))
    )
    assert by_name(comma) == by_name(open_data(str(tmp_path / "a.jsonl"))) == by_name(tab)
    assert comma.fingerprint == tab.fingerprint


def test_byte_order_mark_and_line_ends_are_not_part_of_labels(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    rows = [f'"{name}","{";".join(classes)}"' for name, classes in zip(names, labels, strict=True)]
    path = tmp_path / "labels.csv"
    path.write_bytes("\r\n".join(["\ufefffile,labels", *rows]).encode())
    assert open_data(str(path)).classes == CLASSES


def test_split_column_assigns_splits(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 18), sets_of(18)
    role = ["train"] * 10 + ["Val"] * 4 + ["testing"] * 4
    rows = [f"{n},{';'.join(f)},{r}" for n, f, r in zip(names, labels, role, strict=True)]
    data = open_data(str(table(tmp_path, rows, "file,labels,split")))
    assert {image.name for image in data.train} == set(names[:10])
    assert {image.name for image in data.val} == set(names[10:14])
    assert {image.name for image in data.test} == set(names[14:])


def test_labels_files_of_the_other_splits_are_read(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 24), sets_of(24)
    rows = [f"{name},{';'.join(classes)}" for name, classes in zip(names, labels, strict=True)]
    table(tmp_path, rows[16:], name="valid.csv")
    data = open_data(str(table(tmp_path, rows[:16], name="train.csv")), val_fraction=0)
    assert {image.name for image in data.test} == set(names[16:])  # without a test file, it is what tests
    table(tmp_path, rows[16:], name="val.csv")
    refused(tmp_path / "train.csv", "'val.csv' and 'valid.csv'")


def test_coco_annotations_keep_images_without_objects(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    train = pictures(root / "train2017", 24)
    val = pictures(root / "val2017", 8, first=100)
    shown = sets_of(24)
    shown[5] = []
    path = coco(root / "annotations" / "instances_train2017.json", train, shown)
    coco(root / "annotations" / "instances_val2017.json", val, sets_of(8))
    data = open_data(str(path))
    assert data.task == "multi-label" and data.name == "coco"
    assert data.classes == ("fox", "cat", "dog")  # by id, without categories that no image has
    classes = by_name(data)
    assert set(classes["train2017/000.png"]) == set(shown[0]) and classes["train2017/005.png"] == []
    assert {image.name for image in data.test} == {f"val2017/{name}" for name in val}
    elsewhere = tmp_path / "labels"
    coco(elsewhere / "x.json", train, sets_of(24))
    refused(elsewhere / "x.json", "24 of 24 images", "000.png", "--data-dir")
    assert len(open_data(str(elsewhere / "x.json"), data_dir=root / "train2017")) == 24


def test_fingerprint_of_a_multi_label_set_depends_on_labels(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    fingerprints = []
    for first in (labels[0], ["cat", "dog", "fox"]):
        rows = [f"{n},{';'.join(f)}" for n, f in zip(names, [first, *labels[1:]], strict=True)]
        fingerprints.append(open_data(str(table(tmp_path, rows))).fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    names = pictures(tmp_path, 3)
    rows = [f"{name},cat;dog" for name in (*names, "gone.png", "lost.png")]
    refused(table(tmp_path, rows), "2 of 5 images", "gone.png (line 5)", "--data-dir")


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("file,labels", ["000.png,cat", "001.png,"], ["line 3", "001.png has no labels"]),
        ("file,labels", ["000.png,cat", "001.png, ; "], ["line 3", "has no labels"]),
        ("file,labels", ["000.png,cat", ",dog"], ["line 3", "the file name is missing"]),
        ("file,labels", ["000.png,cat,dog"], ["line 2", "cat;dog"]),
        ("000.png,cat", ["001.png,dog"], ["got '000.png,cat'", "file,labels"]),
        ("file;labels", ["000.png;dog"], ["separated by commas"]),
        ("file,labels", [], ["contains no images"]),
        ("file,labels", ["000.png,cat", "001.png,cat"], ["only one class, 'cat'"]),
        (
            "file,labels",
            ["000.png,cat", "001.png,dog", "000.png,dog"],
            ["line 2", "line 4", "different labels"],
        ),
        ("file,labels,split", ["000.png,cat,train", "001.png,dog,"], ["1 of its 2 images", "line 3"]),
        ("file,labels,split", ["000.png,cat,best"], ["got 'best'", "train"]),
        ("file,labels,split", ["000.png,cat;dog,train", "001.png,fox,test"], ["'fox', but none to train on"]),
        ("file,labels,split", ["000.png,cat,val", "001.png,dog,test"], ["no image in the split 'train'"]),
    ],
)
def test_table_errors_name_the_line(tmp_path: Path, header: str, rows: list[str], words: list[str]) -> None:
    pictures(tmp_path, 3)
    refused(table(tmp_path, rows, header), *words)


def test_same_row_twice_is_one_image(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    rows = [f"{name},{';'.join(classes)}" for name, classes in zip(names, labels, strict=True)]
    assert len(open_data(str(table(tmp_path, [*rows, *rows])))) == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file": "000.png", "labels": ["cat"', ["line 2", "not JSON"]),
        ('["000.png", "cat"]', ["line 2", "list"]),
        ('{"file": "000.png", "labels": []}', ["line 2", "no labels"]),
        ('{"file": "000.png", "labels": [0.5]}', ["line 2", "labels must be strings"]),
        ('{"file": "000.png"}', ["line 2", "no labels"]),
    ],
)
def test_json_lines_errors_name_the_line(tmp_path: Path, line: str, words: list[str]) -> None:
    pictures(tmp_path, 3)
    path = tmp_path / "labels.jsonl"
    path.write_text('{"file": "001.png", "labels": ["cat", "dog"]}\n' + line, encoding="utf-8")
    refused(path, *words)


def test_table_that_is_not_utf_8_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"file,labels\na.png,cat\nb.png,caf\xe9\n")
    refused(tmp_path / "labels.csv", "line 3: it is not UTF-8")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"annotations": []}, ["no annotations"]),
        ({"categories": {}}, ["not a COCO annotations file"]),
        ({"annotations": [{"image_id": 100, "category_id": 44}]}, ["category 44"]),
        ({"annotations": [{"image_id": 9, "category_id": 7}]}, ["image 9"]),
        (
            {"categories": [{"id": number, "name": "cat"} for number in (1, 7, 90)]},
            ["two categories named 'cat'"],
        ),
        ({"images": [{"id": [1], "file_name": "000.png"}]}, ["entry of images lacks an 'id'"]),
    ],
)
def test_invalid_coco_annotations_are_refused(tmp_path: Path, more: dict[str, Any], words: list[str]) -> None:
    names = pictures(tmp_path, 3)
    refused(coco(tmp_path / "x.json", names, sets_of(3), **more), *words)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.xlsx").write_bytes(b"PK")
    refused(tmp_path / "labels.xlsx", "is neither a folder", ".csv")
    (tmp_path / "labels.json").write_text("[1, 2")
    refused(tmp_path / "labels.json", "not JSON")


def test_folder_without_class_folders_points_at_the_labels_file_in_it(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 3)
    path = table(tmp_path, ["images/000.png,cat;dog"])
    refused(tmp_path, "only one class, 'images'", f"{path} contains the labels, use it as --data")


@pytest.mark.parametrize("combined", ["{}|{}", "['{}', '{}']", "['{}' '{}']", '["{}","{}"]', "[{}, {}]"])
def test_separators_and_lists_in_a_table_are_several_labels(tmp_path: Path, combined: str) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    cells = [combined.format(*some) if len(some) == 2 else some[0] for some in labels]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "labels"), *zip(names, cells, strict=True)])
    data = open_data(str(tmp_path / "labels.csv"))
    assert data.task == "multi-label" and by_name(data) == dict(zip(names, labels, strict=True))


@pytest.mark.parametrize("separator", [", ", " ", "/", " + ", "&"])
def test_label_that_consists_of_other_labels_is_refused(tmp_path: Path, separator: str) -> None:
    names = pictures(tmp_path, 12)
    cells = [("leaf spot", "rust", f"leaf spot{separator}rust", "ok")[n % 4] for n in range(12)]
    rows = [f'{name},"{cell}"' for name, cell in zip(names, cells, strict=True)]
    refused(table(tmp_path, rows), "'leaf spot' and 'rust'", "as in leaf spot;rust", ".jsonl")
    lines = [json.dumps({"file": name, "label": [cell]}) for name, cell in zip(names, cells, strict=True)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    assert f"leaf spot{separator}rust" in open_data(str(tmp_path / "labels.jsonl")).classes
    (tmp_path / "labels.jsonl").write_text(
        "\n".join(line.replace("[", "").replace("]", "") for line in lines)
    )
    refused(tmp_path / "labels.jsonl", "'leaf spot' and 'rust'")


def test_labels_of_several_words_are_single_labels(tmp_path: Path) -> None:
    names = pictures(tmp_path, 12)
    classes = ("golden retriever", "labrador retriever", "tench, Tinca tinca", "t-shirt/top")
    rows = [f'{name},"{classes[n % 4]}"' for n, name in enumerate(names)]
    data = open_data(str(table(tmp_path, rows)))
    assert data.task == "classification" and data.classes == tuple(sorted(classes))


@pytest.mark.parametrize("kind", [str, float, int])
def test_coco_ids_may_be_text_and_unused_categories_may_repeat_a_name(tmp_path: Path, kind: type) -> None:
    names, shown = pictures(tmp_path, 24), sets_of(24)
    path = coco(tmp_path / "x.json", names, shown)
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": "cat"})  # Roboflow's root
    for annotation in content["annotations"]:
        annotation["category_id"] = kind(annotation["category_id"])
        annotation["image_id"] = kind(annotation["image_id"])
    path.write_text(json.dumps(content))
    data = open_data(str(path))
    assert data.classes == ("fox", "cat", "dog") and "left out: 'cat', 'unseen'" in " ".join(data.notes)
    assert {name: sorted(labels) for name, labels in by_name(data).items()} == dict(
        zip(names, shown, strict=True)
    )


def test_coco_image_ids_may_be_any_text(tmp_path: Path) -> None:
    path = coco(tmp_path / "x.json", pictures(tmp_path, 24), sets_of(24))
    text = re.sub(r'"image_id": (\d+)', r'"image_id": "frame-\1"', path.read_text())
    path.write_text(re.sub(r'"id": (\d+), "file_name"', r'"id": "frame-\1", "file_name"', text))
    assert len(open_data(str(path))) == 24


@pytest.mark.parametrize("data", ["set", "set/train/_annotations.coco.json"])
def test_coco_files_in_split_folders_are_the_three_splits(tmp_path: Path, data: str) -> None:
    for n, split in enumerate(("train", "valid", "test")):
        root = tmp_path / "set" / split
        coco(root / "_annotations.coco.json", pictures(root, 12, first=100 * n), sets_of(12))
    images = open_data(str(tmp_path / data))
    assert (len(images.train), len(images.val), len(images.test)) == (12, 12, 12) and images.name == "set"
    assert all(image.name.startswith("valid/") for image in images.val)


def test_files_with_windows_separators_or_another_unicode_form_are_found(tmp_path: Path) -> None:
    names = pictures(tmp_path / "sub", 20)
    accented = unicodedata.normalize("NFD", "é.png")
    (tmp_path / "sub" / names[0]).rename(tmp_path / "sub" / accented)
    rows = [rf"sub\{name},{CLASSES[n % 2]}" for n, name in enumerate(["é.png", *names[1:]])]
    data = open_data(str(table(tmp_path, rows)))
    assert len(data) == 20 and f"sub/{accented}" in by_name(data)
    save(tmp_path.parent / "secret.png", 99)
    refused(table(tmp_path, [*rows, r"..\secret.png,cat"]), "outside of")


def test_labels_of_another_unicode_form_are_equal(tmp_path: Path) -> None:
    names = pictures(tmp_path, 12)
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    rows = [f"{name},{(*forms, 'tea')[n % 3]}" for n, name in enumerate(names)]
    assert open_data(str(table(tmp_path, rows))).classes == (forms[0], "tea")


def test_what_a_labels_file_does_not_use_is_reported(tmp_path: Path) -> None:
    names, labels = pictures(tmp_path, 20), sets_of(20)
    rows = [f"{name},{';'.join(classes)}" for name, classes in zip(names, labels, strict=True)]
    table(tmp_path, rows[:4], name="train.csv")
    data = open_data(str(table(tmp_path, rows[:18], name="test.csv")))
    assert data.notes == (
        "not used, although next to test.csv: 'train.csv'; use the file of train for all of them",
        "2 images next to those of test.csv are not in it, such as 018.png",
    )
