"""Coverage of the interval of an ECE: networks of known calibration, drawn many times.

An image has probabilities softmax(z) of ten classes, z ~ N(0, 2²), and its label is drawn from them; a
network predicts softmax(s·z), which is calibrated with s = 1. The true ECE is that of many images.

    python -m benchmarks.papers.ece_interval
"""

import argparse

import numpy as np
from questpress.export.runtime import softmax
from questpress.pipeline.evaluation.calibration import Softmax, measure

from benchmarks.cells import markdown

CLASSES = 10
MANY = 400_000


def draw(rng: np.random.Generator, n: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits [n,classes] of a network, and labels [n]."""
    z = rng.normal(0, 2, (n, CLASSES))
    labels = (softmax(z).cumsum(1) < rng.random((n, 1))).sum(1).clip(max=CLASSES - 1)
    return scale * z, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--images", default="179,1000", help="comma-separated [default: 179,1000]")
    options = parser.parse_args()
    rows = []
    for scale in (1.0, 1.25, 2.0):
        rng = np.random.default_rng(0)
        large = measure(*draw(rng, MANY, scale), Softmax())
        assert large is not None
        truth = 0.0 if scale == 1 else large.ece
        for n in map(int, options.images.split(",")):
            results = [measure(*draw(rng, n, scale), Softmax()) for _ in range(options.trials)]
            held = [result is not None and result.ece_low <= truth <= result.ece_high for result in results]
            low, high = np.percentile([result.ece for result in results if result is not None], (2.5, 97.5))
            shown = f"{low:.1f} to {high:.1f}"
            rows.append([f"{scale:g}", f"{truth:.1f}", f"{n:,}", shown, f"{100 * np.mean(held):.0f} %"])
    columns = ["s", "true ECE, %", "images", "95 of 100 ECEs measured, %", "intervals that hold the true one"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
