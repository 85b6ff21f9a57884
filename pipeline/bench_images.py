"""What the files of a bench are asked about: pictures, and inputs made of them."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..export.runtime import Classifier, ImageError, decode_image, render
from .data.sources.folders import EXTENSIONS
from .errors import UsageError

INPUTS = 64
"""Different inputs that a subject sees in turn."""

MOST_BYTES = 256 * 1024 * 1024
"""Of inputs of one subject; larger ones are fewer."""

SYNTHETIC = 8
SYNTHETIC_SIZE = (1024, 768)


def image_files(given: Sequence[Path], most: int = INPUTS) -> list[Path]:
    """The images among files and folders, at most so many, evenly spread.

    Raises:
        UsageError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise UsageError(f"There is no {path}; --images takes image files and folders of them.")
        found += sorted(_below(path)) if path.is_dir() else [path]
    if not found:
        raise UsageError(f"{', '.join(map(str, given))} holds no image file; --images takes some.")
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


def _below(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file():
            yield file


def readable(files: Sequence[Path]) -> list[bytes]:
    """The contents of those that can be decoded.

    Raises:
        UsageError: none can; the sentence says why of the first.
    """
    contents, refused = [], []
    for file in files:
        try:
            decode_image(file)
        except ImageError as error:
            refused.append(str(error))
        else:
            contents.append(file.read_bytes())
    if not contents:
        raise UsageError(f"None of the images can be read: {refused[0]}.")
    return contents


def synthetic(seed: int, count: int = SYNTHETIC) -> list[bytes]:
    """Pictures as large and as rough as photos, JPEG of quality 90, the same for the same seed.

    Noise of every size, each twice as fine as the one before and .6 times as strong: decoding takes about as
    long as that of a photo does, and resizing depends on the size alone.
    """
    width, height = SYNTHETIC_SIZE
    pictures = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        picture, strength = np.zeros((height, width, 3)), 1.0
        for scale in (256, 128, 64, 32, 16, 8, 4, 2):
            coarse = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture += strength * (np.asarray(smooth, dtype=np.float64) - 128)
            strength *= 0.6
        file = io.BytesIO()
        Image.fromarray((128 + picture).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def inputs_of_images(classifier: Classifier, images: Sequence[bytes]) -> np.ndarray:
    """As the file takes them; few pictures give more inputs when they are shifted around."""
    size = classifier.preprocessing.size
    count = fitting((3, size, size), np.dtype(np.uint8 if classifier.takes_pixels else np.float32))
    rendered = np.stack([render(decode_image(image), classifier.preprocessing) for image in images[:count]])
    return classifier.feed(different(rendered, count))


def different(rendered: np.ndarray, count: int) -> np.ndarray:
    """So many different pictures, uint8 [count, S, S, 3], of perhaps fewer: those again, moved sideways."""
    shifts = [np.roll(rendered[i % len(rendered)], i // len(rendered), axis=1) for i in range(count)]
    return np.stack(shifts)


def random_inputs(shape: tuple[int, ...], kind: np.dtype, seed: int) -> np.ndarray:
    """Noise in the place of pictures, [n, *shape]: standard normal, or of pixels whole numbers."""
    rng = np.random.default_rng(seed)
    count = fitting(shape, kind)
    if kind == np.uint8:
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return rng.standard_normal((count, *shape), dtype=np.float32)


def fitting(shape: tuple[int, ...], kind: np.dtype) -> int:
    """How many inputs: 64, or of very large ones as many as fit, two at least."""
    return max(2, min(INPUTS, MOST_BYTES // (int(np.prod(shape)) * kind.itemsize)))
