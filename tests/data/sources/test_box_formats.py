"""Detection data sets: COCO, Pascal VOC and YOLO, with their splits, and files that are not of their form."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.config.options import Options
from questpress.pipeline.data import boxes as boxes_module
from questpress.pipeline.data.dataset import SPLITS, Image, ImageSet
from questpress.pipeline.data.sources import box_rows, open_data, read_data
from questpress.pipeline.errors import UsageError

from tests.support.boxes import (
    COLORS,
    Rectangle,
    Scene,
    draw,
    scene,
    voc_xml,
    write_coco,
    write_voc,
    write_yolo,
    yolo_text,
)
from tests.support.pictures import folder, save, smooth

SCENES = {
    "train": [*(scene(n, names=list(COLORS)[: 1 + n % 3]) for n in range(9)), draw(32, 40, ())],
    "val": [scene(100 + n, 40, 64) for n in range(3)],
    "test": [scene(200 + n, 64, 32) for n in range(4)],
}
WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


def open_boxes(path: Path, **options: Any) -> ImageSet:
    return open_data(str(path), with_boxes=True, **options)


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(UsageError) as error:
        open_boxes(path, **options)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def sizes(data: ImageSet) -> list[int]:
    return [len(data.split(split)) for split in SPLITS]


def pixels_of(image: Image) -> list[tuple[int, ...]]:
    """Return the boxes as they were drawn: class and corners in pixels, and crowd."""
    assert image.size is not None
    height, width = image.size
    return [
        (b.label, *(round(v) for v in (b.x1 * width, b.y1 * height, b.x2 * width, b.y2 * height)), b.crowd)
        for b in image.boxes or ()
    ]


def drawn(item: Scene) -> list[tuple[int, ...]]:
    return sorted((list(COLORS).index(name), *rest) for name, *rest in item.rectangles)


@pytest.mark.parametrize("kind", WRITERS)
def test_boxes_sizes_and_splits_are_read(kind: str, tmp_path: Path) -> None:
    data = open_boxes(WRITERS[kind](tmp_path / "data", SCENES))
    assert data.task == "detection" and data.classes == tuple(COLORS) and sizes(data) == [10, 3, 4]
    assert data.notes == () and data.skipped == ()
    for split in SPLITS:
        read = sorted((image.size, pixels_of(image)) for image in data.split(split))
        assert read == sorted((s.pixels.shape[:2], drawn(s)) for s in SCENES[split])
    empty = next(image for image in data.train if not image.labels)
    assert empty.boxes == () and empty.size == (32, 40)
    some = next(image for image in data.train if len(image.labels) == 2)
    assert some.labels == (0, 1) and [box.label for box in some.boxes or ()] == [0, 1]
    height, width = some.size or (0, 0)
    assert [box.area for box in some.boxes or ()] == [
        pytest.approx((b.x2 - b.x1) * (b.y2 - b.y1) * height * width, abs=0.6) for b in some.boxes or ()
    ]
    counts = {split: sum(len(s.rectangles) > 1 for s in SCENES[split]) for split in SPLITS}
    assert {split: data.counts[split][1] for split in SPLITS} == counts


def test_formats_of_the_same_data_have_the_same_fingerprint(tmp_path: Path) -> None:
    data = [open_boxes(write(tmp_path / kind, SCENES)) for kind, write in WRITERS.items()]
    assert len({item.fingerprint for item in data}) == 1
    assert data[0].train[0].boxes == data[1].train[0].boxes == data[2].train[0].boxes
    assert data[0].fingerprint != open_data(str(tmp_path / "coco/train.json")).fingerprint


def test_same_annotations_are_labels_for_a_classifier(tmp_path: Path) -> None:
    data = open_data(str(write_coco(tmp_path, SCENES)))
    assert data.task == "multi-label" and sizes(data) == [10, 3, 4]
    assert all(image.boxes is None and image.size is None for image in data.train)


def test_one_class_is_enough(tmp_path: Path) -> None:
    data = open_boxes(write_coco(tmp_path, {"train": [scene(n, names=["green"]) for n in range(20)]}))
    assert data.classes == ("green",) and sizes(data) == [16, 2, 2]


def test_roboflow_folders_are_read(tmp_path: Path) -> None:
    expected = open_boxes(write_coco(tmp_path / "expected", SCENES)).fingerprint
    names = {"train": "train", "val": "valid", "test": "test"}
    for split, name in names.items():
        for kind in ("coco", "voc", "yolo"):
            (tmp_path / kind / name).mkdir(parents=True)
        (tmp_path / "yolo" / name / "images").mkdir()
        (tmp_path / "yolo" / name / "labels").mkdir()
        content = json.loads((tmp_path / f"expected/{split}.json").read_text())
        content["categories"].insert(0, {"id": 0, "name": "blood", "supercategory": "none"})
        (tmp_path / "coco" / name / "_annotations.coco.json").write_text(json.dumps(content))
        for number, item in enumerate(SCENES[split]):
            for place in (f"coco/{name}", f"voc/{name}", f"yolo/{name}/images"):
                (tmp_path / place / f"{number}.png").write_bytes(item.png)
            (tmp_path / "voc" / name / f"{number}.xml").write_text(voc_xml(f"{number}.png", item))
            (tmp_path / "yolo" / name / f"labels/{number}.txt").write_text(yolo_text(item, list(COLORS)))
    (tmp_path / "yolo/data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\n"
        "names: ['blue', 'green', 'red']\n"
    )
    for path in ("expected", "coco", "coco/train/_annotations.coco.json", "voc", "yolo", "yolo/data.yaml"):
        data = open_boxes(tmp_path / path)
        assert data.fingerprint == expected, path


def test_val_without_test_is_the_test_split_and_val_is_held_out(tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        data = open_boxes(write(tmp_path / kind, {"train": SCENES["train"], "val": SCENES["val"]}))
        assert len(data.test) == 3 and len(data.val) >= 1 and len(data.train) + len(data.val) == 10
        assert {image.size for image in data.test} == {(40, 64)}


def test_crowds_and_difficult_objects_are_neither_labels_nor_classes(tmp_path: Path) -> None:
    crowd = [Rectangle("red", 2, 2, 20, 30, True), Rectangle("blue", 30, 4, 50, 40)]
    scenes = {"train": [*SCENES["train"][:2], draw(64, 80, crowd)], "test": SCENES["train"][4:5]}
    for write in (write_coco, write_voc):
        data = open_boxes(write(tmp_path / write.__name__, scenes), val_fraction=0)
        image = next(image for image in data.train if (0, 30, 4, 50, 40, False) in pixels_of(image))
        assert data.classes == ("blue", "green")  # red has a group of objects alone
        assert pixels_of(image) == [(0, 30, 4, 50, 40, False)]
    red = draw(64, 80, [Rectangle("red", 1, 1, 9, 9)])
    trained = {"train": [*scenes["train"], red], "test": scenes["test"]}
    data = open_boxes(write_coco(tmp_path / "more", trained), val_fraction=0)
    image = next(image for image in data.train if any(box.crowd for box in image.boxes or ()))
    assert image.labels == (0,)
    assert pixels_of(image) == [(0, 30, 4, 50, 40, False), (2, 2, 2, 20, 30, True)]


def test_voc_pixels_of_the_challenge_start_at_one(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": SCENES["train"][:3], "test": SCENES["test"]})
    before = open_boxes(root, val_fraction=0)
    for file in (root / "Annotations").iterdir():
        source = "<source><database>The VOC2007 Database</database></source></annotation>"
        file.write_text(file.read_text().replace("</annotation>", source))
    after = open_boxes(root, val_fraction=0)
    (first, *_), (second, *_) = pixels_of(before.test[0]), pixels_of(after.test[0])
    assert second == (first[0], max(0, first[1] - 1), max(0, first[2] - 1), *first[3:])


def test_yolo_outlines_are_read_as_boxes(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, SCENES)
    file = root / "labels/train/0.txt"
    file.write_text("0 0.25 0.5 0.5 0.25 0.75 0.75\n")
    image = next(image for image in open_boxes(root).train if image.name == "images/train/0.png")
    assert [box[:5] for box in image.boxes or ()] == [(0, 0.25, 0.25, 0.75, 0.75)]


def test_our_split_is_stratified_and_keeps_near_copies_together(tmp_path: Path) -> None:
    """Every picture is there twice, as PNG and as JPEG of lower quality."""
    images, annotations = [], []
    for n in range(60):
        labels = [1] * (n % 2 == 0) + [2] * (n % 3 == 0) + [3] * (n % 10 == 0)
        for suffix, options in ((".png", {}), (".jpg", {"quality": 60})):
            PillowImage.fromarray(smooth(n, 48, 64)).save(tmp_path / f"{n}{suffix}", **options)
            images.append({"id": len(images), "file_name": f"{n}{suffix}", "height": 48, "width": 64})
            annotations += [
                {"image_id": images[-1]["id"], "category_id": label, "bbox": [n % 7, label, 20, 10 + n % 5]}
                for label in labels
            ]
    categories = [{"id": n, "name": name} for n, name in enumerate("abc", 1)]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    data = open_boxes(path)
    stems = {split: {Path(image.name).stem for image in data.split(split)} for split in SPLITS}
    assert not stems["train"] & stems["test"] and not stems["train"] & stems["val"]
    assert not stems["val"] & stems["test"] and data.leaks == ()
    for label, whole in enumerate((60, 40, 12)):
        for split in ("val", "test"):
            assert data.counts[split][label] == pytest.approx(0.1 * whole, abs=max(2, 0.05 * whole))
            assert data.counts[split][label] >= 2
    assert len(data) == 120 and len(data.test) == pytest.approx(12, abs=4)


def test_hostile_boxes_are_left_out_and_noted(tmp_path: Path) -> None:
    path = write_coco(tmp_path, {"train": SCENES["train"], "test": SCENES["test"]})
    content = json.loads(path.read_text())
    hostile: list[Any] = [
        [float("nan"), 0, 4, 4], [0, 0, float("inf"), 4], [1, 2, 3], "box", None, [True, {}, 4, 4],
        [0, 0, 10**400, 4], [0, 0, -4, 4], [3, 3, 0, 9], [500, 3, 9, 9], [-50, -50, 5, 5],
        [-10, -10, 30, 30],
    ]  # fmt: skip
    annotation = content["annotations"][0]
    content["annotations"] += [annotation | {"bbox": box} for box in hostile] + [annotation]
    path.write_text(json.dumps(content))
    plain = open_boxes(write_coco(tmp_path / "plain", {"train": SCENES["train"], "test": SCENES["test"]}))
    data = open_boxes(path)
    assert data.notes == (
        "boxes left out: 7 with coordinates that are not finite numbers, 2 without a positive width and "
        "height, 2 outside of their image, 1 repeated",
        "boxes clipped at the edge of their image: 1",
    )
    count = [sum(len(i.boxes or ()) for s in SPLITS for i in d.split(s)) for d in (plain, data)]
    assert count[1] == count[0] + 1


def test_images_of_another_shape_than_annotated_are_skipped(tmp_path: Path) -> None:
    path = write_coco(tmp_path, {"train": SCENES["train"], "test": SCENES["test"]})
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": 80, "width": 64}
    del content["images"][1]["height"]
    content["images"][2] |= {"height": "64", "width": 0}
    path.write_text(json.dumps(content))
    data = open_boxes(path, val_fraction=0)
    assert len(data.train) == 9
    assert [(s.name, s.reason, s.unreadable) for s in data.skipped] == [
        ("train/0.png", "it has 80 × 64 pixels, annotated are 64 × 80", True)
    ]


def test_too_many_boxes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_coco(tmp_path, {"train": SCENES["train"], "test": SCENES["test"]})
    content = json.loads(path.read_text())
    number = boxes_module.MAX_BOXES + 1
    annotation = content["annotations"][0]
    content["annotations"] += [annotation | {"bbox": [0, 0, 1 + n / 100, 9]} for n in range(number)]
    path.write_text(json.dumps(content))
    refused(path, "train/0.png has 1,002 boxes", "limit of 1,000")
    monkeypatch.setattr(box_rows, "MAX_BOXES", 2000)
    assert max(len(image.boxes or ()) for image in open_boxes(path).train) == 1002


def test_file_without_usable_boxes_is_refused(tmp_path: Path) -> None:
    empty = draw(20, 20, [Rectangle("red", 3, 3, 9, 3)])
    path = write_coco(tmp_path, {"train": [empty], "test": SCENES["test"]})
    refused(path, "train.json has images of 'red', 'blue', 'green', but none to train on")
    (tmp_path / "test.json").unlink()
    refused(path, "no boxes to train on", "1 without a positive width and height")


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(content)


LABELS, XML = "labels/train/0.txt", "Annotations/train0.xml"
DOUBLED = "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))
NESTED = f"train: images/train\na0: &a0 [x]\n{DOUBLED}\nnames: *a59"
BILLION = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        ("yolo", text(LABELS, "0 0.5 0.5 0.1"), [LABELS + ", line 1", "4 columns", "five"]),
        ("yolo", text(LABELS, "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1 0.9"), ["line 2", "6 columns"]),
        ("yolo", text(LABELS, "7 0.5 0.5 0.1 0.1"), ["class 7 is not in 'names'"]),
        ("yolo", text(LABELS, "red 0.5 0.5 0.1 0.1"), ["class red is not in 'names'"]),
        ("yolo", text(LABELS, "nan 0.5 0.5 0.1 0.1"), ["class nan is not in 'names'"]),
        ("yolo", text("data.yaml", "names: 3\ntrain: images/train"), ["data.yaml", "lacks 'names'"]),
        ("yolo", text("data.yaml", "names: [a, a]\ntrain: images/train"), ["same name"]),
        ("yolo", text("data.yaml", NESTED), ["data.yaml", "lacks 'names'"]),
        ("yolo", text("data.yaml", "names: [a]\ntrain: [[[b]]]"), ["'train' must be folders"]),
        ("yolo", text("data.yaml", "names: [a]\npath: {}\ntrain: [1]"), ["'train' must be folders"]),
        ("yolo", text("data.yaml", "names: [a]\ntrain: 'nowhere'"), ["nowhere is not in", "--data-dir"]),
        ("yolo", text("data.yaml", "names: [a]\ntrain: ../../.."), ["is not in", "--data-dir"]),
        ("yolo", text("data.yaml", "names: [a]\ntrain: ["), ["data.yaml is not YAML"]),
        ("yolo", text("data.yaml", "names: [a]\ntrain:\nval: images/val"), ["lacks 'train'"]),
        (
            "yolo",
            lambda root: (root / "data.yaml").write_bytes(b"train: images/train\nnames: [caf\xe9]"),
            ["data.yaml, line 2: it is not UTF-8"],
        ),
        ("voc", text(XML, "<annotation><object>"), ["train0.xml is not XML"]),
        ("voc", text(XML, BILLION), ["train0.xml declares entities"]),
        ("voc", text(XML, "<annotation><object/></annotation>"), ["train0.xml has an object without a name"]),
        (
            "voc",
            lambda root: (root / "JPEGImages/train0.png").unlink(),
            ["1 of 17 annotations", "train0.xml"],
        ),
        ("voc", text("ImageSets/Main/val.txt", "gone\n"), ["ImageSets/Main lists 'gone'"]),
    ],
)
def test_folder_that_is_not_of_its_form_is_refused(
    kind: str, edit: Callable[[Path], Any], words: Sequence[str], tmp_path: Path
) -> None:
    path = WRITERS[kind](tmp_path / "data", SCENES)
    edit(path)
    refused(path, *words)


def test_data_and_network_of_different_tasks_are_refused(tmp_path: Path) -> None:
    for kind, write in (("Pascal VOC", write_voc), ("YOLO", write_yolo)):
        path = write(tmp_path / kind, SCENES)
        with pytest.raises(UsageError, match=rf"{kind}.*has boxes \({kind}\).*retinanet:resnet34\.$"):
            open_data(str(path))
    classes = folder(tmp_path / "classes", {"cat": 4, "dog": 4})
    refused(classes, "has no boxes, which a detector requires", "COCO")
    refused(Path("digits"), "--data digits has no boxes")
    refused(Path("torch/cifar10"), "--data torch/cifar10 has no boxes")
    save(tmp_path / "table/0.png", 0)
    (tmp_path / "table/labels.csv").write_text("file,label\n0.png,cat\n")
    refused(tmp_path / "table/labels.csv", "labels.csv has labels, and no boxes")
    refused(tmp_path / "table", "has no boxes", "labels.csv contains the labels")


def test_class_folders_with_other_xml_and_yaml_files_are_class_folders(tmp_path: Path) -> None:
    root = folder(tmp_path, {"cat": 10, "dog": 10})
    (root / "meta.xml").write_text("<meta/>")
    (root / "data.yaml").write_text("license: CC0\n")
    data = open_data(str(root))
    assert data.task == "classification" and data.classes == ("cat", "dog")


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "data", SCENES)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name, place in (("0.png", "images"), ("1.txt", "labels")):
        file = root / place / "train" / name
        file.rename(outside / name)
        file.symlink_to(outside / name)
    data = open_boxes(root)
    assert len(data.train) == 9 and any("links that lead out" in note for note in data.notes)
    followed = open_boxes(root, follow_links=True)
    assert followed.fingerprint == open_boxes(write_yolo(tmp_path / "plain", SCENES)).fingerprint


def test_boxes_are_read_for_validation(tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        path = write(tmp_path / kind, {"train": SCENES["train"], "test": SCENES["test"]})
        data = read_data(str(path), with_boxes=True, for_training=False)
        assert data.task == "detection" and len(data.images["test"]) == 4
        assert all(image.boxes for image in data.images["test"])


def test_detectors_choose_boxes_and_classifiers_labels(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "data", SCENES)
    options: dict[str, Any] = {"data": str(path), "method": "none", "dry_run": True, "image_size": 64}
    detector, classifier = "retinanet:mobilenetv2_050", "resnet10t"
    chosen, data = resolve(Options(teacher=[detector], student=detector, **options))
    assert data.task == "detection" and chosen.out is not None
    assert chosen.out.name == "retinanet-mobilenetv2_050-retinanet-mobilenetv2_050-data"
    assert resolve(Options(teacher=[classifier], student=classifier, **options))[1].task == "multi-label"
    with pytest.raises(
        UsageError, match=f"^--teacher {classifier} and --student {detector}: one is a detector"
    ):
        resolve(Options(teacher=[classifier], student=detector, **options))
    with pytest.raises(UsageError, match="--data digits has no boxes, which a detector"):
        resolve(Options(teacher=[detector], student=detector, **options | {"data": "digits"}))


def test_trainval_list_of_voc_without_val_is_train(tmp_path: Path) -> None:
    root = write_voc(tmp_path, SCENES)
    expected, lists = open_boxes(root).fingerprint, root / "ImageSets/Main"
    both = (lists / "train.txt").read_text() + "\n" + (lists / "val.txt").read_text()
    (lists / "trainval.txt").write_text(both)
    (lists / "train.txt").unlink()
    assert open_boxes(root).fingerprint == expected
