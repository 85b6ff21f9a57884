"""Pictures of colored rectangles whose boxes are known, and the files of detection data sets."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image as PillowImage

COLORS = {"blue": (20, 40, 230), "green": (20, 220, 40), "red": (230, 30, 20)}
"""Color of each class, in the order of their numbers."""

GRAY = 128


class Rectangle(NamedTuple):
    """A filled rectangle, in pixels."""

    name: str
    left: int
    top: int
    right: int
    bottom: int
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    pixels: np.ndarray
    rectangles: tuple[Rectangle, ...]

    @property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        PillowImage.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()


def draw(height: int, width: int, rectangles: Sequence[Rectangle]) -> Scene:
    pixels = np.full((height, width, 3), GRAY, np.uint8)
    for name, left, top, right, bottom, _ in rectangles:
        pixels[top:bottom, left:right] = COLORS[name]
    return Scene(pixels, tuple(rectangles))


def scene(seed: int, height: int = 64, width: int = 80, names: Sequence[str] = tuple(COLORS)) -> Scene:
    """Return a scene with a rectangle of each name, each in a separate column."""
    rng = np.random.default_rng(seed)
    column = width // max(1, len(names))
    rectangles = []
    for number, name in enumerate(names):
        wide, tall = int(rng.integers(column // 2, column - 2)), int(rng.integers(height // 4, height // 2))
        left, top = number * column + int(rng.integers(1, column - wide)), int(rng.integers(0, height - tall))
        rectangles.append(Rectangle(name, left, top, left + wide, top + tall))
    return draw(height, width, rectangles)


def find_rectangle(pixels: np.ndarray, name: str) -> tuple[float, float, float, float] | None:
    """Return the box of a color in an image uint8 [H, W, 3], in fractions; None if it is not there.

    An edge lies where a pixel is half of the color, so that a box is found to a fraction of a pixel.
    """
    color, gray = np.array(COLORS[name], float), np.full(3, GRAY, float)
    axis = color - gray
    amount = (pixels - gray) @ axis / (axis @ axis)  # 1 in the rectangle
    others = np.abs(pixels - gray - amount[..., None] * axis).max(-1) > 40
    amount = np.where(others, 0, amount.clip(0, 1))
    if not (amount > 0.5).any():
        return None
    spans = []
    for reduced in (amount.max(0), amount.max(1)):
        inside = np.flatnonzero(reduced > 0.5)
        spans.append((inside[0] / len(reduced), (inside[-1] + 1) / len(reduced)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def write_coco(root: Path, splits: Mapping[str, Sequence[Scene]]) -> Path:
    """Write SPLIT.json and images in SPLIT/; return the path of the first."""
    numbers = {name: 10 * (number + 1) for number, name in enumerate(COLORS)}
    for split, scenes in splits.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number, item in enumerate(scenes):
            (root / split / f"{number}.png").write_bytes(item.png)
            height, width = item.pixels.shape[:2]
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            annotations += [
                {
                    "image_id": number,
                    "category_id": numbers[r.name],
                    "bbox": [r.left, r.top, r.right - r.left, r.bottom - r.top],
                    "iscrowd": int(r.crowd),
                }
                for r in item.rectangles
            ]
        categories = [{"id": numbers[name], "name": name} for name in COLORS]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root / f"{next(iter(splits))}.json"


def voc_xml(file: str, item: Scene, size: tuple[int, int] | None = None) -> str:
    height, width = size or item.pixels.shape[:2]
    objects = "".join(
        f"<object><name>{r.name}</name><difficult>{int(r.crowd)}</difficult><bndbox><xmin>{r.left}</xmin>"
        f"<ymin>{r.top}</ymin><xmax>{r.right}</xmax><ymax>{r.bottom}</ymax></bndbox></object>"
        for r in item.rectangles
    )
    return (
        f"<annotation><filename>{file}</filename><size><width>{width}</width><height>{height}</height></size>"
        f"{objects}</annotation>"
    )


def write_voc(root: Path, splits: Mapping[str, Sequence[Scene]]) -> Path:
    """Write Annotations, JPEGImages and ImageSets; return the folder."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, scenes in splits.items():
        for number, item in enumerate(scenes):
            (root / f"JPEGImages/{split}{number}.png").write_bytes(item.png)
            (root / f"Annotations/{split}{number}.xml").write_text(voc_xml(f"{split}{number}.png", item))
        names = "\n".join(f"{split}{number}" for number in range(len(scenes)))
        (root / f"ImageSets/Main/{split}.txt").write_text(names)
    return root


def write_yolo(root: Path, splits: Mapping[str, Sequence[Scene]]) -> Path:
    """Write data.yaml, images/SPLIT and labels/SPLIT; return the folder."""
    names = list(COLORS)
    for split, scenes in splits.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number, item in enumerate(scenes):
            (root / f"images/{split}/{number}.png").write_bytes(item.png)
            if item.rectangles:  # an image without boxes needs no file
                (root / f"labels/{split}/{number}.txt").write_text(yolo_text(item, names))
    content = {"names": names, **{split: f"images/{split}" for split in splits}}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root


def yolo_text(item: Scene, names: Sequence[str]) -> str:
    height, width = item.pixels.shape[:2]
    return "".join(
        f"{names.index(r.name)} {(r.left + r.right) / 2 / width!r} {(r.top + r.bottom) / 2 / height!r} "
        f"{(r.right - r.left) / width!r} {(r.bottom - r.top) / height!r}\n"
        for r in item.rectangles
    )
