"""The runtime's geometry is timm's evaluation transform, pixel for pixel."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from questpress.export.runtime import Preprocessing, normalize, render
from timm.data import create_transform

SHAPES = [(40, 60), (61, 37), (33, 33), (200, 31), (1, 1), (1, 50), (24, 24), (27, 90), (90, 120)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow resize rows before columns, as before version 13."""
    resize = Image.Image.resize

    def resize_rows_first(image: Image.Image, size: tuple[int, int], *options: Any) -> Image.Image:
        return resize(resize(image, (size[0], image.height), *options), size, *options)

    monkeypatch.setattr(Image.Image, "resize", resize_rows_first)


@pytest.mark.usefixtures("rows_first")
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_inputs_equal_timms_evaluation_transform_exactly(crop_mode: str, interpolation: str) -> None:
    mean, std = (0.485, 0.4, 0.3), (0.229, 0.2, 0.31)
    for crop_fraction in (0.875, 0.9, 1.0, 1.25):
        p = Preprocessing.create(24, crop_fraction, interpolation, crop_mode, mean, std)
        transform = create_transform(
            (3, 24, 24), crop_pct=crop_fraction, crop_mode=crop_mode, interpolation=interpolation, mean=mean,
            std=std,
        )  # fmt: skip
        for shape in SHAPES:
            try:
                expected = transform(Image.fromarray(noise(*shape)))
            except ValueError:  # timm rounds the short side of (1, 50) to 0 in 'border'
                assert crop_mode == "border" and min(shape) == 1
                continue
            np.testing.assert_array_equal(normalize(render(noise(*shape), p)[None], p)[0], expected.numpy())


@pytest.mark.usefixtures("rows_first")
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(24, 40), (40, 9)])
def test_rectangles_equal_timms_evaluation_transform_exactly(crop_mode: str, size: tuple[int, int]) -> None:
    p = Preprocessing.create(size, 0.875, "bilinear", crop_mode)
    transform = create_transform((3, *size), crop_pct=0.875, crop_mode=crop_mode, interpolation="bilinear")
    for shape in [(40, 60), (61, 37), (33, 33), (200, 31), size]:
        expected = transform(Image.fromarray(noise(*shape)))
        np.testing.assert_array_equal(normalize(render(noise(*shape), p)[None], p)[0], expected.numpy())


def test_rectangle_survives_json_and_equal_sides_are_a_number() -> None:
    p = Preprocessing.create((96, 36), 0.875)
    values = json.loads(json.dumps(p.to_dict()))
    assert (values["size"], values["resize"]) == ([96, 36], [109, 41])
    assert Preprocessing.from_dict(values) == p
    assert Preprocessing.create((32, 32)) == Preprocessing.create(32)


def test_resized_side_is_rounded_down() -> None:
    assert Preprocessing.create(224, 0.875).resize == 256
    assert Preprocessing.create(96, 0.95).resize == math.floor(96 / 0.95) == 101


def test_very_long_image_costs_no_more_than_its_crop() -> None:
    image = np.zeros((2, 2_000_000, 3), np.uint8)
    image[:, 999_000:1_001_000] = (10, 20, 30)
    shown = render(image, Preprocessing.create(64, 0.875, "bilinear"))
    assert shown.shape == (64, 64, 3)
    np.testing.assert_array_equal(shown, np.broadcast_to(np.uint8([10, 20, 30]), shown.shape))


def test_columns_of_a_very_tall_image_are_resized_first() -> None:
    image = np.broadcast_to(noise(100, 1).repeat(10_000, axis=0), (1_000_000, 1, 3))
    expected = Image.fromarray(np.ascontiguousarray(image)).resize((1, 64), Image.Resampling.BICUBIC)
    shown = render(image, Preprocessing.create(64, 1.0, "bicubic", "squash"))
    np.testing.assert_array_equal(shown, np.asarray(expected).repeat(64, axis=1))


def test_long_images_are_rendered_nearly_alike_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Preprocessing.create(24, 0.875, "bicubic")
    for shape in [(40, 60), (61, 37), (200, 31), (1, 50)]:
        whole = render(noise(*shape), p)
        monkeypatch.setattr("questpress.export.runtime.preprocessing._MAX_RESIZED_PIXELS", 0)
        cut = render(noise(*shape), p)
        monkeypatch.undo()
        assert abs(whole.astype(int) - cut).mean() < 0.5


def test_normalizing_is_the_formula_in_float32() -> None:
    p = Preprocessing.create(5, 1.0, "bicubic", "center", (0.1, 0.5, 0.9), (0.2, 0.5, 1.0))
    pixels = np.stack([noise(5, 5), noise(5, 5)[::-1]])
    expected = (
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - torch.tensor(p.mean).view(1, 3, 1, 1)
    ) / torch.tensor(p.std).view(1, 3, 1, 1)
    batch = normalize(pixels, p)
    assert batch.dtype == np.float32 and batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, expected.numpy())


def test_preprocessing_survives_json() -> None:
    p = Preprocessing.create(96, 0.95, "lanczos", "border", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    written = json.loads(json.dumps(p.to_dict()))
    assert Preprocessing.from_dict(written) == p
    assert written["library"] == "Pillow" and written["antialias"] is True and written["version"] == 1


WRONG = ("x", "", b"x", None, True, -1, 20_000_000, 10**400, math.nan, math.inf, [], ["8"], {}, {"a": 1})
WRONG_BY_FIELD = {
    "version": (2,), "library": ("OpenCV",), "antialias": (False, 1), "color": ("BGR",),
    "size": (0, 8.5, "8", 8193, [96], [96, 36, 3], [96, 0], ["96", "36"], [96.5, 36], [True, 96], [None] * 2),
    "resize": (110,), "crop_fraction": (0, "0.875", 1e-300, 3), "interpolation": ("random",),
    "crop_mode": ("corner",), "gray_bits": (7, 17, "12", 12.0, [12]),
    "mean": (0.5, "123", [0.5] * 2, [1e39] * 3, [math.nan] * 3, ["0.5"] * 3, [None] * 3, [[1]] * 3),
    "std": ([0.0, 1.0, 1.0], [1e308] * 3, [1e-45] * 3, [10**400] * 3, [True] * 3),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG_BY_FIELD)
def test_wrong_value_is_refused_by_its_name(field: str) -> None:
    values = Preprocessing.create(96, gray_bits=12).to_dict()
    for wrong in (*WRONG, *WRONG_BY_FIELD[field]):
        if wrong is not values[field]:
            with pytest.raises(ValueError, match=f"^(preprocessing with )?{field} ") as refused:
                Preprocessing.from_dict({**values, field: wrong})
            assert len(str(refused.value)) < 250
