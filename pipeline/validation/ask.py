"""What networks answer to images: each image is read once, in batches, and nothing but logits is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...export.runtime import Pixels, Preprocessing, render
from ..api.validate_inputs import Asked
from ..data.dataset import Image, Progress, Skipped
from ..data.decode import check_unreadable, made_of_each
from ..errors import UsageError
from ..evaluation import calibration

BATCH = 32


@dataclass(frozen=True)
class Answers:
    """``logits[i]`` float32 [n,classes of network i] to ``images``, those that could be read."""

    images: tuple[Image, ...]
    logits: list[np.ndarray]
    skipped: tuple[Skipped, ...]


def ask(
    images: Sequence[Image], networks: Sequence[Asked], skipped: Sequence[Skipped], progress: Progress
) -> Answers:
    """The networks' logits.

    Args:
        skipped: what was left out before; of all images 1 % may be unreadable.

    Raises:
        JobError: more are unreadable, or an image has changed since it was opened.
        UsageError: none can be read.
    """
    forms = list(dict.fromkeys(one.classifiers[0].preprocessing for one in networks))
    kept: list[Image] = []
    unread: list[Skipped] = []
    found: list[list[np.ndarray]] = [[] for _ in networks]
    for batch, rendered in _batches(images, _rendered(forms), unread, progress):
        kept += batch
        for logits, one in zip(found, networks, strict=True):
            pixels = rendered[forms.index(one.classifiers[0].preprocessing)]
            logits.append(_together(one, pixels))
    before = sum(one.unreadable for one in skipped)
    check_unreadable([*skipped, *unread], len(images) + before)
    if not kept:
        raise UsageError("None of the images can be read.")
    return Answers(tuple(kept), [np.concatenate(each) for each in found], tuple(unread))


def _together(network: Asked, pixels: np.ndarray) -> np.ndarray:
    """float32 [B,classes]: logits, of several teachers those of their mean probabilities."""
    each = [one.answers(pixels) for one in network.classifiers]
    return calibration.together(each, multilabel=network.several).astype(np.float32)


def _rendered(forms: Sequence[Preprocessing]) -> Callable[[Pixels], list[Pixels]]:
    return lambda image: [render(image, form) for form in forms]


def _batches(
    images: Sequence[Image],
    form: Callable[[Pixels], list[Pixels]],
    unread: list[Skipped],
    progress: Progress,
) -> Iterator[tuple[list[Image], list[np.ndarray]]]:
    """Batches of readable images, rendered in each form: uint8 [B,S,S,3]. The others go to ``unread``."""
    batch: list[tuple[Image, list[Pixels]]] = []
    for done, (image, made) in enumerate(zip(images, made_of_each(images, form), strict=True), 1):
        if isinstance(made, str):
            unread.append(Skipped(image.name, made, unreadable=True))
        else:
            batch.append((image, made))
        if batch and (len(batch) == BATCH or done == len(images)):
            columns = zip(*(pixels for _, pixels in batch), strict=True)
            yield [one for one, _ in batch], [np.stack(column) for column in columns]
            batch = []
        progress(done, len(images))
