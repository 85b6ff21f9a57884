"""A bench worker for the whole way from an image file to an answer, each step timed.

`python -m questpress.export.latency.end_to_end_worker`: as `bench_worker`, but `inputs` is a folder of
encoded images, and a run's times are four: decoding, resizing, normalising, running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import Classifier, decode_image, render
from .bench_worker import Block, answer_requests

STEPS = ("decode", "resize", "normalise", "run")


def main() -> None:
    answer_requests(_block)


def _block(first: dict[str, Any]) -> Block:
    classifier = Classifier.load(first["model"], threads=first["threads"])
    images = sorted(Path(first["inputs"]).iterdir())
    place = 0

    def block(request: dict[str, Any]) -> np.ndarray:
        nonlocal place
        rows = []
        end = time.perf_counter() + request["seconds"]
        while True:
            rows.append(once(classifier, images[place], time.perf_counter_ns))
            place = (place + 1) % len(images)
            if time.perf_counter() >= end:
                return np.array(rows, dtype=np.float64).ravel() / 1e6

    return block


def once(classifier: Classifier, image: Path, clock: Callable[[], int]) -> list[int]:
    """The times of one image's steps, in the clock's unit: what `Classifier.predict` does, step by step."""
    times = [clock()]
    pixels = decode_image(image)
    times.append(clock())
    rendered = render(pixels, classifier.preprocessing)
    times.append(clock())
    batch = np.ascontiguousarray(classifier.feed(rendered[None]))
    times.append(clock())
    classifier.probabilities(classifier.logits(batch))
    times.append(clock())
    return [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    main()
