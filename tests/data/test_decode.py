import errno
import io
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageFile
from questpress.export.runtime import Preprocessing, decode_image, render
from questpress.pipeline.data.dataset import Image, Skipped
from questpress.pipeline.data.decode import (
    Canonical,
    check_unreadable,
    decode_images,
    render_images,
    sample_sizes,
    shown_fractions,
)
from questpress.pipeline.data.sources import folders, open_data
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.cache import Cache

from tests.support.pictures import folder, in_memory, open_folder, pixels, save, smooth

PHOTO = Canonical("short_side", 32)


def test_photo_is_reduced_to_its_short_side_and_never_enlarged() -> None:
    shapes = {(64, 96): (32, 48), (96, 64): (48, 32), (32, 40): (32, 40), (10, 500): (10, 40)}
    shapes |= {(400, 100): (128, 32), (2000, 100): (128, 32), (33, 33): (32, 32)}
    shapes |= {(20, 20): (20, 20), (1, 1): (1, 1)}
    for (height, width), expected in shapes.items():
        assert PHOTO.convert(pixels(0, height, width)).shape == (*expected, 3)


def test_photo_is_reduced_until_it_just_covers_a_rectangle() -> None:
    form = Canonical("short_side", (32, 16))
    shapes = {(64, 96): (32, 48), (96, 24): (64, 16), (20, 90): (20, 80), (2000, 100): (128, 16)}
    for (height, width), expected in shapes.items():
        assert form.convert(pixels(0, height, width)).shape == (*expected, 3)


def test_squashed_and_padded_images_show_everything() -> None:
    image = np.full((40, 10, 3), 100, dtype=np.uint8)
    image[:10] = 200
    squashed = Canonical("fixed", (16, 8), "bilinear", "squash").convert(image)
    assert squashed.shape == (16, 8, 3) and (squashed[:3] == 200).all() and (squashed[6:] == 100).all()
    padded = Canonical("fixed", 16, "bilinear", "border", (0.2, 0.0, 0.0)).convert(image)
    assert (padded[:3, 6:10] == 200).all() and (padded[6:, 6:10] == 100).all()
    assert (padded[:, :6] == (51, 0, 0)).all() and (padded[:, 10:] == (51, 0, 0)).all()


def test_fraction_of_a_picture_that_the_input_shows() -> None:
    sizes = [(100, 100), (100, 200), (128, 48), (20, 20)]
    shown = shown_fractions(sizes, Preprocessing.create(32, 1.0))
    assert shown == pytest.approx([1, 0.5, 0.376, 1], abs=0.01)
    assert shown_fractions(sizes[:2], Preprocessing.create(32, 0.5)) == [0.25, 0.125]
    assert shown_fractions(sizes, Preprocessing.create(32, 1.0, crop_mode="squash")) == [1, 1, 1, 1]
    assert shown_fractions(sizes, Preprocessing.create(32, 1.0, crop_mode="border")) == [1, 1, 1, 1]
    assert shown_fractions([(128, 48)], Preprocessing.create((64, 24), 1.0)) == [1]


def test_sizes_are_those_of_upright_images(tmp_path: Path) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        PillowImage.fromarray(smooth(int(name[0]), 20, 30)).save(tmp_path / "a" / name, exif=exif)
    for number in range(3):
        save(tmp_path / "b" / f"{number}.png", number)
    sizes = sample_sizes([image for image in open_folder(tmp_path, val_fraction=0).train if image.label == 0])
    assert set(sizes) == {(30, 20)}


def test_panorama_keeps_its_center() -> None:
    image = np.zeros((10, 1000, 3), dtype=np.uint8)
    image[:, 480:520] = 255
    assert (PHOTO.convert(image) == 255).all()


def test_square_image_equals_the_runtimes_rendering() -> None:
    image = smooth(1, 40, 60)
    expected = render(image, Preprocessing.create(32, crop_fraction=1.0, interpolation="bilinear"))
    np.testing.assert_array_equal(Canonical("fixed", 32, "bilinear").convert(image), expected)
    same = pixels(0, 32, 32)
    np.testing.assert_array_equal(Canonical("fixed", 32).convert(same), same)


def test_reducing_is_antialiased() -> None:
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    reduced = PHOTO.convert(stripes)[:, 4:-4].astype(int)  # a filter sees the border
    assert np.abs(reduced - 127.5).max() < 3


@pytest.mark.parametrize("cached", [False, True])
def test_decoding_preserves_images_of_all_sizes(tmp_path: Path, cached: bool) -> None:
    arrays = [pixels(n, 8 + n, 20 - n) for n in range(10)]
    images = in_memory(arrays, labels=list(range(10)))
    for _ in range(2):
        done = decode_images(images, PHOTO, cache=Cache(tmp_path) if cached else None)
        for number, array in enumerate(arrays):
            np.testing.assert_array_equal(done.pixels.image(number).numpy(), array)
        assert done.labels.tolist() == list(range(10)) and done.skipped == ()
        assert done.keys.tolist() == [int(bin(int(image.key, 16))[2:].zfill(256)[:63], 2) for image in images]


def test_rendering_equals_the_runtime(tmp_path: Path) -> None:
    images = open_folder(folder(tmp_path, {"a": 3, "b": 3})).train
    preprocessing = Preprocessing.create(8, crop_fraction=0.875)
    batch = render_images(images, preprocessing, cache=Cache(tmp_path / "cache")).pixels.stack().numpy()
    for row, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(row, render(decode_image(tmp_path / image.name), preprocessing))


def test_no_images_give_no_pixels(tmp_path: Path) -> None:
    done = decode_images([], PHOTO, cache=Cache(tmp_path))
    assert len(done.pixels) == 0 and done.labels.shape == (0,) and done.images == ()


def test_decoded_images_are_cached_and_recomputed_if_damaged(tmp_path: Path) -> None:
    images = in_memory([pixels(n) for n in range(4)])
    cache = Cache(tmp_path)
    calls: list[tuple[int, int]] = []
    first = decode_images(images, PHOTO, cache=cache, progress=lambda *call: calls.append(call))
    assert calls[-1] == (4, 4)
    calls.clear()
    decode_images(images, PHOTO, cache=cache, progress=lambda *call: calls.append(call))
    assert calls == []
    (file,) = tmp_path.rglob("pixels.bin")
    before = first.pixels.data.clone()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    again = decode_images(images, PHOTO, cache=cache, progress=lambda *call: calls.append(call))
    assert calls[-1] == (4, 4) and again.pixels.data.equal(before)


def test_cache_entries_depend_on_form_and_images(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    images = in_memory([pixels(n, 40, 40) for n in range(4)])
    decode_images(images, PHOTO, cache=cache)
    smaller = decode_images(images, Canonical("short_side", 16), cache=cache)
    assert smaller.pixels.image(0).shape == (16, 16, 3)
    assert decode_images(images[:2], PHOTO, cache=cache).pixels.image(0).shape == (32, 32, 3)
    assert render_images(images, Preprocessing.create(8), cache=cache).pixels.stack().shape == (4, 8, 8, 3)
    assert len(list(tmp_path.rglob("pixels.bin"))) == 4


def test_writing_to_decoded_images_does_not_change_the_cache(tmp_path: Path) -> None:
    images = in_memory([pixels(n) for n in range(4)])
    decode_images(images, PHOTO, cache=Cache(tmp_path)).pixels.data.zero_()
    assert decode_images(images, PHOTO, cache=Cache(tmp_path)).pixels.data.any()


def test_image_changed_during_the_run_is_an_error(tmp_path: Path) -> None:
    images = open_folder(folder(tmp_path, {"a": 3, "b": 3})).train
    save(tmp_path / images[0].name, 77)
    with pytest.raises(JobError, match=f"{images[0].name} was changed during the run"):
        decode_images(images, PHOTO)


def broken(kind: str, path: Path) -> None:
    whole = io.BytesIO()
    PillowImage.fromarray(smooth(0, 64, 64)).save(whole, "JPEG")
    truncated = whole.getvalue()[: len(whole.getvalue()) // 2]
    contents = {"zero bytes": b"", "truncated": truncated, "a text file": b"this is no image\n"}
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", ["zero bytes", "truncated", "a text file"])
def test_unreadable_image_is_skipped_and_listed(tmp_path: Path, kind: str) -> None:
    folder(tmp_path, {"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    broken(kind, tmp_path / "train/a/broken.jpg")
    images = open_data(str(tmp_path), val_fraction=0)
    for cache in (None, Cache(tmp_path / "cache"), Cache(tmp_path / "cache")):
        done = decode_images(images.train, PHOTO, cache=cache)
        (skipped,) = (*images.skipped, *done.skipped)
        assert skipped.name == "train/a/broken.jpg" and skipped.unreadable and skipped.reason
        assert len(done.images) == len(done.pixels) == 12
        assert "train/a/broken.jpg" not in [image.name for image in done.images]
        assert done.pixels.image(11).any()


def test_unreadable_test_image_is_skipped(tmp_path: Path) -> None:
    folder(tmp_path, {"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    broken("a text file", tmp_path / "test/b/broken.jpg")
    images = open_data(str(tmp_path))
    done = render_images(images.test, Preprocessing.create(8))
    assert [file.name for file in done.skipped] == ["test/b/broken.jpg"]
    assert done.pixels.stack().shape == (4, 8, 8, 3) and done.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_fault_of_the_machine_stops_and_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    images = open_folder(folder(tmp_path, {"a": 3, "b": 3})).train
    cache, fail = Cache(tmp_path / "cache"), Mock(side_effect=fault)
    with monkeypatch.context() as faulty:
        faulty.setattr(
            *((Image, "read") if isinstance(fault, OSError) else (ImageFile.ImageFile, "load")), fail
        )
        with pytest.raises(
            JobError, match=r"a/0\.png could not be read: (Input/output error|not enough mem)"
        ):
            decode_images(images, PHOTO, cache=cache)
    assert list((tmp_path / "cache" / "images").iterdir()) == []
    assert len(decode_images(images, PHOTO, cache=cache).images) == len(images)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_fault_while_files_are_listed_leaves_no_image_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    fault = OSError(number, os.strerror(number))
    monkeypatch.setattr(folders, "check_file_size", Mock(side_effect=[None, fault, *[None] * 9]))
    with pytest.raises(JobError, match=rf"\.png could not be read: {os.strerror(number)}"):
        open_data(str(tmp_path))


def test_more_than_one_percent_unreadable_images_is_an_error() -> None:
    one = [Skipped(f"a/{n}.jpg", "the file is empty", unreadable=True) for n in range(20)]
    links = [Skipped("a/link", "a link that leads nowhere")] * 50
    check_unreadable([*one[:2], *links], 200)
    with pytest.raises(JobError) as caught:
        check_unreadable([*one[:3], *links], 200)
    assert "3 of 200 images" in str(caught.value) and "a/2.jpg (the file is empty)" in str(caught.value)
    with pytest.raises(JobError) as caught:
        check_unreadable(one, 100)
    sentence = str(caught.value)
    assert sentence.count(".jpg") == 5 and "and 15 more" in sentence and "\n" not in sentence
    assert caught.value.exit_code == 1
