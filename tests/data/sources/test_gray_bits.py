"""16-bit gray images: the range of their content is measured, and is part of what decodes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.export.runtime import Preprocessing
from questpress.pipeline.config.network import NetworkSpec
from questpress.pipeline.data.decode import Canonical, decode_images, render_images
from questpress.pipeline.data.sources import open_data

from tests.support.pictures import folder


def write(root: Path, largest: int, count: int = 6) -> Path:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([number, ord(label)])
            values = rng.integers(0, largest + 1, (24, 24), dtype=np.uint16)
            values[0, 0] = largest
            PillowImage.fromarray(values).save(root / label / f"{number}.png")
    return root


@pytest.mark.parametrize(("largest", "bits"), [(3699, 12), (239, 8), (1023, 10), (40_000, 16)])
def test_bits_of_the_content_scale_all_images(tmp_path: Path, largest: int, bits: int) -> None:
    data = open_data(str(write(tmp_path, largest)))
    assert data.gray_bits == bits and all(image.gray_bits == bits for image in data.test)
    top = largest >> (bits - 8)
    assert decode_images(data.train, Canonical("short_side", 32)).pixels.data.max() == top > 127
    rendered = render_images(data.test, Preprocessing.create(24, 1.0)).pixels.stack()
    assert rendered.max() == top
    notes = f"16-bit gray images use {bits} bits: {(1 << bits) - 1} is shown as white"
    assert [note.startswith(notes) for note in data.notes] == [True] * (bits < 16)


def test_bits_are_part_of_the_fingerprint_and_of_the_preprocessing(tmp_path: Path) -> None:
    data = open_data(str(write(tmp_path, 3699)))
    plain = type(data)(data.name, data.source, data.classes, *(
        tuple(type(image)(image.name, image.label, image.key, image.source) for image in data.split(split))
        for split in ("train", "val", "test")
    ))  # fmt: skip
    assert data.fingerprint != plain.fingerprint
    preprocessing = NetworkSpec("resnet18", 32, 2, "", gray_bits=12).preprocessing
    stored = json.loads(json.dumps(preprocessing.to_dict()))
    assert stored["gray_bits"] == 12 and Preprocessing.from_dict(stored) == preprocessing
    assert "gray_bits" not in NetworkSpec("resnet18", 32, 2, "").preprocessing.to_dict()


def test_sliver_of_the_range_is_reported(tmp_path: Path) -> None:
    root = write(tmp_path, 900)
    values = np.asarray(PillowImage.open(root / "a" / "0.png")).copy()
    values[0, 0] = 65535  # one marker
    for number in range(6):
        PillowImage.fromarray(values + np.uint16(number)).save(root / "a" / f"{number}.png")
    data = open_data(str(root))
    assert data.gray_bits == 16
    assert any(note.startswith("most 16-bit gray images use 10 of 16 bits") for note in data.notes)


def test_other_images_have_no_bits(tmp_path: Path) -> None:
    data = open_data(str(folder(tmp_path, {"a": 4, "b": 4})))
    assert data.gray_bits == 16 and not data.notes
