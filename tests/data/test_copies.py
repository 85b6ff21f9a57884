from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.pipeline.api.validate.images import choose_images
from questpress.pipeline.data import copies
from questpress.pipeline.data.copies import find_copies
from questpress.pipeline.data.dataset import SPLITS, Copies, Image, ImageSet
from questpress.pipeline.data.decode import decode_each
from questpress.pipeline.data.sources import open_data, read_data
from questpress.pipeline.data.splits import UnsplitDataset
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.tasks import load_task

from tests.support.pictures import in_memory, smooth


def save(path: Path, pixels: np.ndarray, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels).save(path, **how)


def find(folder: Path, cache: Cache | None = None) -> Copies:
    return find_copies([image for part in read_data(str(folder)).images.values() for image in part], cache)


def by_name(folder: Path) -> dict[str, str]:
    return {image.name: image.key for part in read_data(str(folder)).images.values() for image in part}


def twins(folder: Path, count: int = 30) -> Path:
    """Write each picture as PNG and as JPEG, in two classes."""
    for n in range(count):
        save(folder / "ab"[n % 2] / f"{n}.png", smooth(n, 32, 32))
        save(folder / "ab"[n % 2] / f"{n}.jpg", smooth(n, 32, 32))
    return folder


def test_equal_pixels_in_other_files_are_one_content(tmp_path: Path) -> None:
    save(tmp_path / "a/5.jpg", smooth(0, 300, 400))
    save(tmp_path / "a/6.jpg", smooth(0, 300, 400), comment="other metadata")
    first, other = np.asarray(PillowImage.open(tmp_path / "a/5.jpg")), smooth(1, 40, 30)
    for name in ("0.png", "1.bmp", "2.webp"):
        save(tmp_path / "a" / name, first, **({"lossless": True} if name == "2.webp" else {}))
    save(tmp_path / "a/3.png", first, dpi=(7, 7))  # other metadata
    for name in ("a/4.png", "b/0.png", "b/1.png"):
        save(tmp_path / name, other + (name == "b/1.png"))
    keys, found = by_name(tmp_path), find(tmp_path)
    same = [keys[f"a/{name}"] for name in ("0.png", "1.bmp", "2.webp", "3.png", "5.jpg", "6.jpg")]
    assert {found.equal[key] for key in same} == {min(same)}
    assert found.equal.keys() == set(same)  # the same file in two classes has one key


@pytest.mark.parametrize("change", ["quality", "smaller", "larger", "brighter by little"])
def test_same_picture_in_another_form_is_a_near_copy(tmp_path: Path, change: str) -> None:
    for n in range(6):
        picture = PillowImage.fromarray(smooth(n, 96, 128))
        save(tmp_path / f"{'ab'[n % 2]}/{n}.png", np.asarray(picture))
        size = {"smaller": (64, 48), "larger": (300, 225)}.get(change, picture.size)
        pixels = np.asarray(picture.resize(size))
        if change == "brighter by little":
            pixels = np.clip(pixels.astype(int) + 2, 0, 255).astype(np.uint8)
        save(tmp_path / f"{'ab'[n % 2]}/{n}.jpg", pixels, quality=60)
    keys, found = by_name(tmp_path), find(tmp_path)
    groups = [{n for n, key in keys.items() if found.near[key] == first} for first in {*found.near.values()}]
    pairs = [{f"{'ab'[n % 2]}/{n}.png", f"{'ab'[n % 2]}/{n}.jpg"} for n in range(6)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, pairs)) and not found.equal


def test_different_pictures_are_no_copies() -> None:
    noise = np.random.default_rng(0)
    colors = [np.full((32, 32, 3), color, np.uint8) for color in range(0, 250, 25)]
    grains = [np.clip(120 + 25 * noise.normal(size=(48, 48, 3)), 0, 255).astype(np.uint8) for _ in range(30)]
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None, :, None].repeat(32, 0)
    tints = [(ramp * np.array(tint)).astype(np.uint8) for tint in ([1, 0, 0], [0, 0.509, 0], [0, 0, 1])]
    images = in_memory([*colors, *grains, *tints, *(smooth(n, 32, 32) for n in range(60))])
    copies = find_copies(images)
    assert not copies.equal and not copies.near


def test_near_copies_with_other_labels_are_not_linked() -> None:
    pictures = [smooth(n // 2, 40, 40) // 2 + n % 2 for n in range(8)]
    assert len(find_copies(in_memory(pictures)).near) == 8
    assert not find_copies(in_memory(pictures, [n % 2 for n in range(8)])).near


def test_copies_stay_together_when_we_split(tmp_path: Path) -> None:
    data = open_data(str(twins(tmp_path, 80)))
    split_of = {image.name: split for split in SPLITS for image in data.split(split)}
    assert len(split_of) == 160 and not data.leaks
    for n in range(80):
        assert split_of[f"{'ab'[n % 2]}/{n}.png"] == split_of[f"{'ab'[n % 2]}/{n}.jpg"]
    assert data.counts == {"train": [64, 64], "val": [8, 8], "test": [8, 8]}


def test_split_does_not_depend_on_order_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsplit = read_data(str(twins(tmp_path / "data", 20)))
    images, cache = list(unsplit.images["train"]), Cache(tmp_path / "cache")
    plain = find_copies(images)
    assert find_copies(reversed(images), cache) == plain
    decoded: list[Image] = []

    def decode_new(new: list[Image], *how) -> Iterator:
        decoded.extend(new)
        return decode_each(new, *how)

    monkeypatch.setattr(copies, "decode_each", decode_new)
    assert find_copies(images, cache) == plain and not decoded
    unsplit = read_data(str(twins(tmp_path / "data", 21)))
    assert len(find_copies(unsplit.images["train"], cache).near) == 42
    assert {image.name for image in decoded} == {"a/20.png", "a/20.jpg"}


def test_copies_between_the_splits_of_the_user_are_counted(tmp_path: Path) -> None:
    for n in range(12):
        save(tmp_path / f"train/{'ab'[n % 2]}/{n}.png", smooth(n, 32, 32))
        save(tmp_path / f"test/{'ab'[n % 2]}/{n}.jpg", smooth(n if n < 5 else n + 50, 32, 32))
    save(tmp_path / "test/b/equal.bmp", smooth(11, 32, 32))
    data = open_data(str(tmp_path), val_fraction=0)
    assert sum(leak.in_test for leak in data.leaks) == len(data.leaks) == 5
    assert data.leaks[0].names == ("test/a/0.jpg", "train/a/0.png")
    # Equal pixels leave train, as equal files do.
    assert [group.removed for group in data.duplicates] == [("train/b/11.png",)]
    assert len(data.train) == 11 and len(data.test) == 13


def split(images: list[Image], found: Copies) -> ImageSet:
    return UnsplitDataset("set", "set", ["0", "1"], {"train": images}).split(None, found)


def test_class_of_few_groups_is_split_and_reported() -> None:
    images = in_memory([smooth(n, 16, 16) for n in range(40)], [n // 20 for n in range(40)])
    keys = [image.key for image in images]
    groups = {key: min(part) for part in (keys[:10], keys[10:20]) for key in part}
    data = split(images, Copies(near=groups))
    assert data.counts == {"train": [16, 16], "val": [2, 2], "test": [2, 2]}
    assert sum(leak.in_test for leak in data.leaks) == 2


def test_large_group_trains() -> None:
    images = in_memory([smooth(n, 16, 16) for n in range(60)], [n // 30 for n in range(60)])
    large = [image.key for image in images[:20]]
    data = split(images, Copies(near=dict.fromkeys(large, min(large))))
    assert {*large} <= {image.key for image in data.train} and not data.leaks
    assert min(data.counts["test"]) >= 1


def test_copies_count_once_in_test(tmp_path: Path) -> None:
    for n in range(6):
        for split in ("train", "test"):
            save(tmp_path / f"{split}/{'ab'[n % 2]}/{n}.png", smooth(n + 50 * (split == "test"), 24, 24))
    for n in range(60):
        save(tmp_path / f"test/a/copy {n}.png", smooth(50, 24, 24))
    save(tmp_path / "test/a/copy.bmp", smooth(50, 24, 24))
    data = open_data(str(tmp_path), val_fraction=0)
    assert len(data.test) == 6
    (group,) = data.duplicates
    assert len(group.names) == 62 and len(group.removed) == 61 and group.kept == "test"


def test_copies_count_once_in_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for n in range(6):
        save(tmp_path / f"data/{'ab'[n % 2]}/{n}.png", smooth(n, 24, 24))
    for n in range(60):
        save(tmp_path / f"data/a/copy {n}.{'png' if n % 2 else 'bmp'}", smooth(0, 24, 24))
    images = choose_images(
        str(tmp_path / "data"), None, [], load_task("classification"), None, False, False, lambda *_: None
    )
    assert len(images.images) == 6
    assert "60 of the 66 images are copies of others and are left out." in images.warnings
