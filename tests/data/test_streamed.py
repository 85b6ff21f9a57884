import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from questpress.export.runtime import Preprocessing
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.data.decode import Canonical, decode_images, render_images
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.streaming import StreamedViews, measure_images, rendered_batches
from questpress.pipeline.data.views import ViewPolicy
from questpress.pipeline.data.workers import Workers
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.cache import Cache

from tests.support.pictures import in_memory, open_folder, pixels, save, smooth

SIZE = 24
POLICIES = {
    "pad_crop": ViewPolicy("pad_crop", side=SIZE, crop=SIZE, pad=3, mode="reflect"),
    "resized_crop": ViewPolicy("resized_crop"),
    "jittered": ViewPolicy("resized_crop", color_jitter=0.4),
    "strong": ViewPolicy("resized_crop", randaugment=(2, 9), erasing=0.5, mixup=1.0, cutmix=1.0),
    "center": ViewPolicy("center", flip=False),
    "tall": ViewPolicy("resized_crop", aspect=0.5),
}
BROKEN = "train/a/broken.jpg"


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, ...]:
    """Photos of many sizes in two classes, and one that cannot be decoded."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(20):
        folder = root / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = smooth(number, 30 + 3 * number, 90 - 2 * number)
        PillowImage.fromarray(picture).save(folder / f"{number}.jpg")
    for name in ("test/a/0.png", "test/b/1.png"):
        save(root / name, hash(name) % 100)
    (root / BROKEN).write_bytes((root / "train/a/0.jpg").read_bytes()[:300])
    return open_folder(root, val_fraction=0).train


def canonical(policy: ViewPolicy) -> Canonical:
    return Canonical("fixed", SIZE) if policy.kind == "pad_crop" else Canonical("short_side", 36)


def both(images: tuple[Image, ...], policy: ViewPolicy, workers: Workers) -> tuple[Views, StreamedViews]:
    form = canonical(policy)
    with tempfile.TemporaryDirectory() as cache:
        sized = measure_images(images, form, workers, cache=Cache(Path(cache)))
    done = decode_images(images, form)
    assert sized.images == done.images and sized.skipped == done.skipped
    return (
        Views(done.labels, done.keys, policy, 7, SIZE, done.pixels),
        StreamedViews(sized.labels, sized.keys, policy, 7, SIZE, sized, form, workers),
    )


def plan(images: int, batches: int = 4, size: int = 9) -> list[tuple[torch.Tensor, torch.Tensor]]:
    numbers = torch.arange(batches * size)
    return list(zip((numbers * 5 % images).split(size), (numbers // images).split(size), strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_streamed_views_equal_views_of_decoded_images(
    images: tuple[Image, ...], workers: Workers, name: str
) -> None:
    decoded, streamed = both(images, POLICIES[name], workers)
    assert len(streamed) == len(decoded) == 20
    assert streamed.keys.equal(decoded.keys) and streamed.labels.equal(decoded.labels)
    steps, sizes = plan(20), ((10, 5), (SIZE, 12)) if name == "tall" else ((10, 10), (SIZE, SIZE))
    decoded, streamed = (replace(views, size=sizes[0]) for views in (decoded, streamed))
    several = zip(streamed.batches(steps, also=sizes[1]), decoded.batches(steps, also=sizes[1]), strict=True)
    for step, alone, (ours, theirs) in zip(steps, streamed.batches(steps), several, strict=True):
        expected = *decoded.batch(*step), decoded.batch(*step, sizes=sizes[1:])[0]
        for views in (alone, ours, theirs):
            assert all(a.equal(b) for a, b in zip(views, expected, strict=False))
        assert (alone[0].shape[2:], ours[2].shape[2:]) == sizes and len(ours) == len(theirs) == 3
        assert alone[0].is_contiguous(memory_format=torch.channels_last)


def test_streamed_views_are_independent_of_the_number_of_workers(
    images: tuple[Image, ...], workers: Workers
) -> None:
    _, two = both(images, POLICIES["jittered"], workers)
    one = replace(two, workers=Workers(1))
    for a, b in zip(one.batches(plan(20)), two.batches(plan(20)), strict=True):
        assert a[0].equal(b[0])


def test_sizes_are_measured_once(images: tuple[Image, ...], workers: Workers, tmp_path: Path) -> None:
    form, calls = canonical(POLICIES["center"]), []
    for _ in range(2):
        sized = measure_images(
            images, form, workers, cache=Cache(tmp_path), progress=lambda *call: calls.append(call)
        )
        (broken,) = sized.skipped
        assert broken.name == BROKEN and broken.unreadable and broken.reason
        done = decode_images(images, form)
        assert sized.heights.equal(done.pixels.heights) and sized.widths.equal(done.pixels.widths)
    assert calls == [(21, 21)]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 20_000


def test_images_without_a_file_are_sent_to_workers(workers: Workers) -> None:
    images = tuple(in_memory([pixels(n, 20, 30) for n in range(5)]))
    decoded, streamed = both(images, POLICIES["resized_crop"], workers)
    for ours, theirs in zip(streamed.batches(plan(5)), decoded.batches(plan(5)), strict=True):
        assert ours[0].equal(theirs[0])


def test_removed_or_changed_image_is_an_error(workers: Workers, tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"):
        save(tmp_path / name, int(name[2]))
    images = open_folder(tmp_path, val_fraction=0).train
    _, streamed = both(images, POLICIES["center"], workers)
    file = tmp_path / images[1].name
    save(file, 77)
    with pytest.raises(JobError, match=f"{images[1].name} was changed during the run"):
        list(streamed.batches(plan(len(images))))
    file.unlink()
    with pytest.raises(JobError, match=f"{images[1].name} could not be read: No such file"):
        list(streamed.batches(plan(len(images))))


def test_rendering_by_workers_equals_render_images(images: tuple[Image, ...], workers: Workers) -> None:
    preprocessing = Preprocessing.create(16)
    expected = render_images(images, preprocessing)
    batches = list(rendered_batches(expected.images, preprocessing, workers, 8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    np.testing.assert_array_equal(torch.cat(batches), expected.pixels.stack())
