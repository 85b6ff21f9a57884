import io
import json
import pickle
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.export.runtime import decode_image
from questpress.pipeline.data.dataset import SPLITS, ImageSet
from questpress.pipeline.data.decode import Canonical, decode_images
from questpress.pipeline.data.sources import open_data, timm_datasets
from questpress.pipeline.data.streaming import measure_images
from questpress.pipeline.data.workers import Workers
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.cache import Cache

from tests.support.pictures import pixels


def png(seed: int) -> bytes:
    out = io.BytesIO()
    PillowImage.fromarray(pixels(seed)).save(out, "PNG")
    return out.getvalue()


def shard(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples(first: int, count: int, ending: str = "png") -> dict[str, bytes]:
    """Labels 0 and 1 in turn; the picture is that of ``pixels(number)``."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= {
            f"s/{number:04d}.cls": f"{number % 2}\n".encode(),
            f"s/{number:04d}.{ending}": png(number),
        }
    return members


def split(name: str, files: list[str], lengths: list[int], **more: Any) -> dict[str, Any]:
    return {
        "name": name, "filenames": files, "shard_lengths": lengths, "num_samples": sum(lengths), **more
    }  # fmt: skip


def shop(root: Path) -> Path:
    """Two shards of training images and one to validate, as timm's reader wants them."""
    shard(root / "shop-train-0.tar", samples(0, 14))
    shard(root / "shop-train-1.tar", samples(14, 10) | {"__meta__": b"x", "s/note.txt": b"no image"})
    shard(root / "shop-val-0.tar", samples(30, 6))
    train = split("train", ["shop-train-0.tar", "shop-train-1.tar"], [14, 10])
    info = {"splits": {"train": train, "validation": split("validation", ["shop-val-0.tar"], [6])}}
    (root / "_info.json").write_text(json.dumps(info))
    return root


def opened(root: Path, **options: Any) -> ImageSet:
    return open_data("wds/shop", data_dir=root, val_fraction=0, **options)


def refused(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        opened(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_in_shards_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_datasets, "MAX_BYTES_IN_MEMORY", 0)
    images = opened(shop(tmp_path))
    assert images.classes == ("0", "1") and images.counts["train"] == [12, 12]
    assert images.counts["test"] == [3, 3]
    for role in SPLITS:
        for image in images.split(role):
            number = int(Path(image.name).stem)
            assert image.name.startswith(f"{'train' if role == 'train' else 'val'}/shop-")
            assert image.label == number % 2
            content = image.read()
            assert content == png(number) and len(pickle.dumps(image)) < 500
            np.testing.assert_array_equal(decode_image(content), pixels(number))
    assert [file.name for file in images.skipped] == ["train/shop-train-1.tar/s/note"]


def test_workers_read_shards(tmp_path: Path) -> None:
    images = opened(shop(tmp_path)).train
    workers = Workers(1)
    form, cache = Canonical("short_side", 8), Cache(tmp_path / "cache")
    assert measure_images(images, form, workers, cache=cache).heights.equal(
        decode_images(images, form).pixels.heights
    )


def test_shards_without_a_list_are_assigned_by_name(tmp_path: Path) -> None:
    shard(tmp_path / "train-000.tar", samples(0, 8, "jpeg"))
    shard(tmp_path / "train-001.tar", samples(8, 8, "JPG"))
    shard(tmp_path / "test.tar", samples(20, 4))
    images = opened(tmp_path)
    assert (len(images.train), len(images.test)) == (16, 4)


def test_labels_are_read_from_json_as_in_timm(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(12):
        label = {"meta": {"label": number % 3 - 1}}  # −1: no label
        members |= {f"{number}.png": png(number), f"{number}.json": json.dumps(label).encode()}
    shard(tmp_path / "a.tar", members)
    info = {"splits": {"train": split("train", ["a.tar"], [12], alt_label="meta/label")}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    images = opened(tmp_path)
    labeled = [image for role in SPLITS for image in images.split(role)]
    assert sorted(int(Path(image.name).stem) % 3 for image in labeled) == [1] * 4 + [2] * 4
    assert all(image.label == int(Path(image.name).stem) % 3 - 1 for image in labeled)


@pytest.mark.parametrize("kept", [1024 + 512 + 100, 1024 + 512 + 1024 + 300])
def test_damaged_shard_is_named(tmp_path: Path, kept: int) -> None:
    shop(tmp_path)
    whole = (tmp_path / "shop-train-1.tar").read_bytes()
    (tmp_path / "shop-train-1.tar").write_bytes(whole[:kept])  # within an image, within a header
    assert "shop-train-1.tar is damaged" in refused(tmp_path)


@pytest.mark.skipif(find_spec("webdataset") is None, reason="the package webdataset is not installed")
def test_timms_reader_finds_the_same_images_and_labels(tmp_path: Path) -> None:
    from timm.data import create_dataset

    root = shop(tmp_path)
    theirs = create_dataset("wds/shop", root=str(root), split="train", input_img_mode="RGB")
    expected = [(np.asarray(picture).tobytes(), label) for picture, label in theirs]
    ours = sorted(opened(root).train, key=lambda image: int(Path(image.name).stem))
    assert [(decode_image(image.read()).tobytes(), image.label) for image in ours] == expected


@pytest.mark.skipif(find_spec("datasets") is None, reason="the package datasets is not installed")
def test_hugging_face_table_is_read_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow.parquet

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    for name, first, count in (("train", 0, 24), ("test", 50, 6)):
        rows = {
            "image": [{"bytes": png(first + n), "path": None} for n in range(count)],
            "label": [n % 2 for n in range(count)],
        }
        (tmp_path / "pets").mkdir(exist_ok=True)
        table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "pets" / f"{name}.parquet")
    images = open_data(f"hfds/{tmp_path / 'pets'}", data_dir=tmp_path / "arrow", val_fraction=0)
    assert images.classes == ("cat", "dog") and (len(images.train), len(images.test)) == (24, 6)
    assert {image.read() for image in images.train} == {png(n) for n in range(24)}
    one, all_ = len(pickle.dumps(images.train[:1])), len(pickle.dumps(images.train))
    assert all_ < one + 24 * 300, "a table travels once with a batch"
    again = pickle.loads(pickle.dumps(images.train))
    assert len({id(image.source.reader) for image in again}) == 1
    workers = Workers(1)
    form, cache = Canonical("short_side", 8), Cache(tmp_path / "cache")
    assert measure_images(images.train, form, workers, cache=cache).widths.equal(
        decode_images(images.train, form).pixels.widths
    )


@pytest.mark.parametrize("mode", ["w:gz", "empty"])
def test_shard_that_is_packed_or_empty_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(timm_datasets, "find_spec", lambda _: None)
    if mode == "empty":
        (tmp_path / "train.tar").touch()
    else:
        shard(tmp_path / "train.tar", samples(0, 8), mode)
    message = refused(tmp_path)
    assert (
        "train.tar is not an uncompressed .tar file. Unpack it" in message
        and "pip install webdataset" in message
    )


def test_image_without_a_label_among_others_is_left_out_and_listed(tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", samples(0, 12) | {"odd.png": png(99), "odd.cls": b"-1"})
    images = opened(tmp_path)
    assert "train/train.tar/odd" in [file.name.removesuffix(".png") for file in images.skipped]
    assert "odd" not in " ".join(image.name for image in images.train)
