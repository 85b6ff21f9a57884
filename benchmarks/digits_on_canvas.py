"""Images of several labels to try things on: two to four of the built-in digits on one canvas.

    python -m benchmarks.digits_on_canvas FOLDER --images 2000

writes FOLDER/images/*.png and FOLDER/labels.csv (file, labels). The digits are scikit-learn's handwritten
ones, at one and a half to two and a half times their size, each in a separate quarter of the canvas. The
same seed gives the same images.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from questpress.pipeline.data.dataset import SPLITS
from questpress.pipeline.data.sources.timm_datasets import read_digits

CANVAS = 48
"""Pixels of a side: four quarters of 24."""


def digits() -> list[tuple[np.ndarray, int]]:
    """Return the built-in digits, grayscale [8,8], and their labels, in the order of their content."""
    data = read_digits().split()
    every = sorted((image for role in SPLITS for image in data.split(role)), key=lambda image: image.key)
    return [(np.asarray(image.read())[..., 0], image.label) for image in every]


def canvas(rng: np.random.Generator, samples: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, set[int]]:
    """Draw two to four digits on black; return grayscale [48,48] uint8 and their labels."""
    picture, shown = np.zeros((CANVAS, CANVAS), dtype=np.uint8), set()
    quarter = CANVAS // 2
    for place in rng.permutation(4)[: rng.integers(2, 5)]:
        pixels, digit = samples[rng.integers(len(samples))]
        side = int(rng.integers(12, 21))
        large = PillowImage.fromarray(pixels).resize((side, side), PillowImage.Resampling.BICUBIC)
        row, column = divmod(int(place), 2)
        top, left = (int(rng.integers(0, quarter - side + 1)) + quarter * part for part in (row, column))
        picture[top : top + side, left : left + side] = np.asarray(large)
        shown.add(digit)
    return picture, shown


def write(folder: Path, images: int, seed: int = 0) -> Path:
    """Write the images and their labels file; return the path of the labels file."""
    rng, samples = np.random.default_rng(seed), digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "labels"])
        for number in range(images):
            picture, shown = canvas(rng, samples)
            name = f"images/{number:05d}.png"
            PillowImage.fromarray(picture).save(folder / name)
            rows.writerow([name, ";".join(str(digit) for digit in sorted(shown))])
    return folder / "labels.csv"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.folder, options.images, options.seed))
