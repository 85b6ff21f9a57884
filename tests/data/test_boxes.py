"""Boxes follow their objects: a colored rectangle is found again by its pixels wherever an image is shown."""

import dataclasses
import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from questpress.export.runtime import Preprocessing, Size, decode_image, height_width
from questpress.pipeline.config.network import NetworkSpec
from questpress.pipeline.config.options import Options
from questpress.pipeline.data.boxes import (
    FRACTIONS,
    MIN_VISIBLE,
    Box,
    Header,
    NamedBox,
    clean_boxes,
    describe_counts,
    follow,
    shown_window,
)
from questpress.pipeline.data.dataset import Image, ImageSet, hash_array
from questpress.pipeline.data.decode import (
    Canonical,
    ReadableImages,
    decode_images,
    read_header,
    render_images,
)
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.streaming import StreamedViews, measure_images
from questpress.pipeline.data.training_data import TrainingData
from questpress.pipeline.data.views import ViewPolicy
from questpress.pipeline.data.workers import Workers
from questpress.pipeline.runs.cache import Cache
from torch import Tensor

from tests.support.boxes import COLORS, Scene, draw, find_rectangle, scene

NAMES = list(COLORS)
SIZES = [(96, 120), (120, 90), (100, 100), (60, 300), (290, 64), (50, 44)]
POLICIES = {
    "resized": ViewPolicy("resized_crop", scale=(0.25, 1.0), flip=True, aspect=4 / 3),
    "center": ViewPolicy("center", flip=True, aspect=4 / 3),
    "pad": ViewPolicy("pad_crop", side=90, crop=90, pad=20, flip=True),
}


def image_of(item: Scene) -> Image:
    height, width = item.pixels.shape[:2]
    boxes = [
        Box(NAMES.index(name), left / width, top / height, right / width, bottom / height, 1.0, crowd)
        for name, left, top, right, bottom, crowd in item.rectangles
    ]
    plain = Image.with_labels("x", [box.label for box in boxes], hash_array(item.pixels), item.pixels)
    return dataclasses.replace(plain, boxes=tuple(boxes), size=(height, width))


def data_of(images: list[Image]) -> ImageSet:
    return ImageSet("x", "x", tuple(NAMES), tuple(images), (), (), task="detection")


IMAGES = [image_of(scene(seed, *size)) for seed, size in enumerate(SIZES)]


def check_rows(pixels: Tensor, rows: Tensor, whole: Tensor) -> int:
    """Compare the rows of one view, float32 [M, 7], with its pixels, uint8 [3, H, W]; return their number.

    ``whole`` [M] are the areas of the whole boxes over that of the view.
    """
    array = pixels.permute(1, 2, 0).numpy().astype(float)
    height, width = array.shape[:2]
    shown = {int(row[0]): row[1:5].tolist() for row in rows if row[0] >= 0}
    for label, name in enumerate(NAMES):
        rectangle = find_rectangle(array, name)
        if label in shown:
            assert rectangle is not None
            x1, y1, x2, y2 = shown[label]
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            assert rectangle[::2] == pytest.approx((x1, x2), abs=1.01 / width)
            assert rectangle[1::2] == pytest.approx((y1, y2), abs=1.01 / height)
        elif rectangle is not None:
            wide, tall = rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]
            too_little = wide * tall < (MIN_VISIBLE + 0.03) * float(whole[label])
            assert too_little or min(wide * width, tall * height) < 3
    return len(shown)


@pytest.mark.parametrize("size", [64, (48, 96)])
@pytest.mark.parametrize("mode", ["border", "squash", "center"])
def test_boxes_of_a_rendered_image_enclose_its_rectangles(mode: str, size: Size) -> None:
    form = Preprocessing.create(height_width(size), 1.0, "bilinear", mode, (0.5, 0.5, 0.5))
    done = render_images(IMAGES, form)
    targets = done.targets(data_of(IMAGES))
    assert targets.shape == (6, 3, 7) and targets.dtype == torch.float32
    for row, image in enumerate(IMAGES):
        _, _, tall, wide = shown_window(*(image.size or (0, 0)), form)
        whole = torch.tensor([(b.x2 - b.x1) * (b.y2 - b.y1) for b in image.boxes or ()]) / (tall * wide)
        count = check_rows(done.pixels.image(row).permute(2, 0, 1), targets[row], whole)
        assert count == 3 or mode == "center"
    if mode == "squash":
        stated = np.array([box[1:5] for box in IMAGES[0].boxes or ()])
        assert targets[0, :, 1:5].numpy() == pytest.approx(stated)


@pytest.mark.parametrize("canonical", ["short_side", "border", "squash"])
@pytest.mark.parametrize("name", POLICIES)
def test_boxes_follow_crop_flip_and_scale(name: str, canonical: str) -> None:
    policy = POLICIES[name]
    form = (
        Canonical("short_side", 80)
        if canonical == "short_side"
        else Canonical("fixed", 90, "bilinear", canonical, (0.5, 0.5, 0.5))
    )
    if name == "pad" and canonical == "short_side":
        pytest.skip("pad_crop requires images of one size")
    done = decode_images(IMAGES, form)
    targets = done.targets(data_of(IMAGES))
    size = (72, 96)
    views = Views(targets, done.keys, policy, 3, size, done.pixels)
    indices, numbers = torch.arange(6).repeat(20), torch.arange(20).repeat_interleave(6)
    pixels, labels = views.batch(indices, numbers)
    assert labels.shape == (120, 3, 7)
    heights, widths = done.pixels.heights, done.pixels.widths
    crops = views.draw(indices, numbers, heights, widths)[0]
    areas = (targets[..., 3] - targets[..., 1]) * (targets[..., 4] - targets[..., 2])
    whole = areas[indices] * (heights * widths)[indices, None] / crops[:, 2:].prod(1)[:, None]
    counts = [check_rows(*view) for view in zip(pixels, labels, whole, strict=True)]
    assert sum(counts) > 120 and (name == "center" or len(set(counts)) > 1)
    kept = labels[..., 0] >= 0
    assert (labels[..., 0][kept] == targets[indices][..., 0][kept]).all()  # rows keep their place
    assert (labels[~kept][:, 0] == -1).all() and not labels[~kept][:, 1:].any()
    again = views.batch(indices[7:9], numbers[7:9])[1]
    assert again.equal(labels[7:9])  # whatever else is in the batch
    other = views.batch(indices, numbers, sizes=((36, 48),))
    assert other[1].equal(labels)


def test_box_is_dropped_from_a_view_by_its_visible_area_and_size() -> None:
    whole = torch.tensor([[[0, 0.4, 0.4, 0.6, 0.6, 9.0, 0], [1, 0.1, 0.1, 0.105, 0.9, 9.0, 1]]])
    side = torch.tensor([100])
    for left, kept in ((55, 0.25), (56, 0.2), (57, None), (61, None)):
        box = torch.tensor([[0, left, 100, 100]])
        rows = follow(whole, box, torch.tensor([False]), side, side, 50)[0]
        if kept is None:
            assert rows[0].tolist() == [-1, 0, 0, 0, 0, 0, 0]
        else:
            assert kept >= MIN_VISIBLE
            assert rows[0].tolist() == pytest.approx([0, 0, 0.4, 0.6 - left / 100, 0.6, 9, 0], abs=1e-6)
    box, flips = torch.tensor([[0, 0, 100, 100]]), torch.tensor([True])
    narrow = follow(whole, box, flips, side, side, 399)[0]
    assert narrow[:, 0].tolist() == [0, -1]  # 1.995 pixels wide
    flipped = follow(whole, box, flips, side, side, 401)[0]
    assert flipped[1].tolist() == pytest.approx([1, 0.895, 0.1, 0.9, 0.9, 9, 1], abs=1e-6)


def test_labels_of_other_tasks_are_unchanged() -> None:
    box, flips, side = torch.tensor([[0, 0, 4, 4]]), torch.tensor([True]), torch.tensor([9])
    for labels in (torch.tensor([5]), torch.ones(1, 3)):
        assert follow(labels, box, flips, side, side, 8) is labels


def test_images_without_boxes_have_unused_rows_only() -> None:
    images = [image_of(draw(20, 30, ())), image_of(scene(0)), image_of(draw(20, 20, ()))]
    form = Canonical("fixed", 16)
    targets = decode_images(images, form).targets(data_of(images))
    assert targets[[0, 2]].equal(torch.tensor([-1.0, 0, 0, 0, 0, 0, 0]).expand(2, 3, 7))
    empty = ReadableImages((images[0],), (), form.window).targets(data_of(images))
    assert empty.shape == (1, 1, 7)
    assert ReadableImages((), (), form.window).targets(data_of(images)).shape == (0, 1, 7)


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(2)


def plan(batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    numbers = torch.arange(batches * 7)
    return list(zip((numbers * 5 % 6).split(7), (numbers // 6).split(7), strict=True))


def test_resumed_and_streamed_views_have_the_same_boxes(workers: Workers, tmp_path: Path) -> None:
    form, data = Canonical("short_side", 40), data_of(IMAGES)
    done, sized = decode_images(IMAGES, form), measure_images(IMAGES, form, workers, Cache(tmp_path))
    policy = POLICIES["resized"]
    views = Views(done.targets(data), done.keys, policy, 5, 32, done.pixels)
    streamed = StreamedViews(sized.targets(data), sized.keys, policy, 5, 32, sized, form, workers)
    whole = [(pixels.clone(), labels) for pixels, labels in views.batches(plan())]
    assert sum(int((labels[..., 0] >= 0).sum()) for _, labels in whole) > 50
    for part in (views.batches(plan()[2:]), streamed.batches(plan()[2:])):
        for (pixels, labels), (expected, targets) in zip(part, whole[2:], strict=True):
            assert pixels.equal(expected) and labels.equal(targets)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_size_of_the_annotation_decides_whether_boxes_turn_with_exif(frame: str, orientation: int) -> None:
    item = scene(4, 96, 144)
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PillowImage.fromarray(item.pixels).save(buffer, "JPEG", quality=98, subsampling=0, exif=exif)
    upright = decode_image(buffer.getvalue())
    header = read_header(buffer.getvalue())
    assert header is not None and header[:2] == upright.shape[:2]
    shown = {name: find_rectangle(upright.astype(float), name) for name in NAMES}
    if frame == "stored":
        boxes, size = [NamedBox(r.name, *r[1:5]) for r in item.rectangles], (96.0, 144.0)
    else:
        tall, wide = upright.shape[:2]
        boxes = [
            NamedBox(name, box[0] * wide, box[1] * tall, box[2] * wide, box[3] * tall)
            for name, box in shown.items()
            if box
        ]
        size = (float(tall), float(wide))
    if frame == "stored" and orientation in (2, 3, 4):
        pytest.skip("mirrored images have the same size: boxes are of the upright image")
    cleaned = clean_boxes(boxes, size, header, Counter())
    assert cleaned is not None and [box.name for box in cleaned] == NAMES
    for box in cleaned:
        assert box[1:5] == pytest.approx(shown[box.name], abs=0.011)


def clean(*boxes: NamedBox, size: tuple[float, float] | None = (50, 100)) -> tuple[tuple, Counter[str]]:
    counts: Counter[str] = Counter()
    cleaned = clean_boxes(boxes, size, Header(50, 100), counts)
    assert cleaned is not None
    return cleaned, +counts


@pytest.mark.parametrize(
    ("corners", "reason"),
    [
        ((math.nan, 0, 10, 10), "not finite"),
        ((0, 0, math.inf, 10), "not finite"),
        ((0, -math.inf, 10, 10), "not finite"),
        ((20, 10, 20, 30), "empty"),
        ((20, 10, 10, 30), "empty"),
        ((20, 30, 30, 10), "empty"),
        ((20, 10, 20.00000001, 30), "empty"),
        ((100, 10, 130, 30), "outside"),
        ((-30, 10, 0, 30), "outside"),
        ((0, 50, 10, 1e30), "outside"),
        ((0, -9, 10, -1), "outside"),
    ],
)
def test_hostile_box_is_left_out_and_counted(corners: tuple[float, ...], reason: str) -> None:
    good = NamedBox("cat", 0, 0, 50, 50)
    cleaned, counts = clean(NamedBox("dog", *corners), good)  # type: ignore[arg-type]
    assert cleaned == (NamedBox("cat", 0, 0, 0.5, 1, 2500.0, False),)
    assert counts == {reason: 1}
    assert describe_counts(counts)[0].startswith("boxes left out: 1 ")


def test_box_over_the_edge_is_clipped_and_counted_from_a_pixel_on() -> None:
    over, barely = NamedBox("cat", -1, 20, 50, 60), NamedBox("cat", 0, 20, 100.9, 50)
    cleaned, counts = clean(over, barely)
    assert [box[1:6] for box in cleaned] == [(0, 0.4, 0.5, 1, 1500), (0, 0.4, 1, 1, 3000)]
    assert counts == {"clipped": 1}
    assert describe_counts(counts) == ["boxes clipped at the edge of their image: 1"]


def test_repeated_boxes_count_once_and_areas_are_those_of_outlines() -> None:
    box = NamedBox("cat", 10, 10, 20, 20, 61.7)
    cleaned, counts = clean(box, box, box._replace(area=math.nan, name="dog"), box._replace(crowd=True))
    assert [(b.name, b.area, b.crowd) for b in cleaned] == [
        ("cat", 62, False), ("cat", 62, True), ("dog", 100, False)
    ]  # fmt: skip
    assert counts == {"repeated": 1}


def test_annotated_size_of_another_scale_is_used_and_of_another_shape_is_not() -> None:
    box, header = NamedBox("cat", 10, 20, 30, 40), Header(50, 100)
    half = clean_boxes([NamedBox("cat", 5, 10, 15, 20)], (25, 50), header, Counter())
    assert half is not None and half[0][1:5] == (0.1, 0.4, 0.3, 0.8) and half[0].area == 100
    assert clean_boxes([box], (100, 100), header, Counter()) is None
    assert clean_boxes([box], (100, 50), header, Counter()) is None  # turned without EXIF
    assert clean_boxes([box], (100, 50), Header(50, 100, 6), Counter()) is not None
    unknown = clean_boxes([box], None, header, Counter())
    fractions = clean_boxes([NamedBox("cat", 0.1, 0.4, 0.3, 0.8)], FRACTIONS, header, Counter())
    assert unknown == fractions == (NamedBox("cat", 0.1, 0.4, 0.3, 0.8, 400, False),)


def test_fingerprint_depends_on_boxes() -> None:
    image = IMAGES[0]
    first, *rest = image.boxes or ()
    moved = dataclasses.replace(image, boxes=(first._replace(x1=first.x1 + 0.01), *rest))
    crowd = dataclasses.replace(image, boxes=(first._replace(crowd=True), *rest))
    renamed = dataclasses.replace(image, name="y")
    fingerprints = [data_of([x]).fingerprint for x in (image, moved, crowd, renamed)]
    assert len(set(fingerprints)) == 3 and fingerprints[0] == fingerprints[3]


@pytest.mark.parametrize("mode", ["border", "squash", "center"])
def test_window_is_what_the_runtime_shows(mode: str) -> None:
    for height, width in ((50, 80), (80, 50), (37, 200), (9, 9)):
        window = shown_window(height, width, Preprocessing.create((40, 60), 1.0, "bilinear", mode))
        top, left, tall, wide = window
        if mode == "squash":
            assert window == (0, 0, 1, 1)
        elif mode == "border":
            assert min(tall, wide) == pytest.approx(1, abs=0.03) and max(top, left) <= 0
        else:
            assert max(tall, wide) == pytest.approx(1, abs=0.03) and min(top, left) >= 0
        assert top == pytest.approx((1 - tall) / 2, abs=0.06)
        assert left == pytest.approx((1 - wide) / 2, abs=0.06)


def test_training_data_shows_boxes_in_views_and_in_whole_images(tmp_path: Path) -> None:
    options = Options(
        data="x", teacher=["retinanet:resnet18"], student="retinanet:mobilenetv2_050", image_size=64,
        crop="resized", crop_scale=0.5, flip=True, resident="host",
    )  # fmt: skip
    data = TrainingData(options, data_of(IMAGES), Cache(tmp_path), "cpu", lambda *_: None)
    assert data.canonical.crop_mode == "border"
    spec = NetworkSpec(options.student, 64, 3, "")
    pixels, targets, decoded = data.rendered("train", spec)
    whole = (targets[..., 3] - targets[..., 1]) * (targets[..., 4] - targets[..., 2])
    shown = [check_rows(*row) for row in zip(pixels.permute(0, 3, 1, 2), targets, whole, strict=True)]
    assert shown == [3] * 6 and decoded.images == tuple(IMAGES)
    views = data.views(seed=1, size=64)
    indices, numbers = torch.arange(6).repeat(5), torch.arange(5).repeat_interleave(6)
    ((drawn, labels),) = views.batches([(indices, numbers)])
    counts = [
        check_rows(view, rows, torch.full((3,), torch.inf)) for view, rows in zip(drawn, labels, strict=True)
    ]
    assert sum(counts) > 45 and labels.shape == (30, 3, 7)
