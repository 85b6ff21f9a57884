"""Large JPEGs decoded at a fraction of their size, as artifacts do, compared with decoding all pixels.

    python -m benchmarks.latency.large_photos runs/shop/artifact photos/test

enlarges each photo of the class folders to --megapixels, classifies it both ways on one thread, and prints
accuracies, the images that only one of them gets right, McNemar's p, and the median time from file to input.
"""

import argparse
import io
import math
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image
from questpress.export.runtime import Classifier, decode_image, render
from questpress.pipeline.evaluation.comparison import mcnemar


def enlarge(file: Path, megapixels: float) -> bytes:
    """Return a photo as a JPEG of quality 90 with this many million pixels."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    factor = math.sqrt(megapixels * 1e6 / (image.width * image.height))
    size = round(image.width * factor), round(image.height * factor)
    content = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("photos", type=Path, help="a folder of class folders")
    parser.add_argument("--megapixels", type=float, default=12.0)
    options = parser.parse_args()
    model = Classifier.load(options.artifact, threads=1)
    decoders = {"all pixels": decode_image, "as shipped": model.decode}
    correct: dict[str, list[bool]] = {name: [] for name in decoders}
    milliseconds: dict[str, list[float]] = {name: [] for name in decoders}
    for file in sorted(options.photos.glob("*/*")):
        content = enlarge(file, options.megapixels)
        for name, decode in decoders.items():
            start = time.perf_counter()
            pixels = render(decode(content), model.preprocessing)
            milliseconds[name].append(1000 * (time.perf_counter() - start))
            predicted = int(model.predict_logits(pixels[None]).argmax())
            correct[name].append(model.labels[predicted] == file.parent.name)
    print("| decoded | accuracy | only this is right | median, ms |\n|---|---|---|---|")
    plain, shipped = (np.array(correct[name]) for name in decoders)
    alone = {"all pixels": int((plain & ~shipped).sum()), "as shipped": int((shipped & ~plain).sum())}
    for name in decoders:
        percent, median = 100 * np.mean(correct[name]), statistics.median(milliseconds[name])
        print(f"| {name} | {percent:.1f} % | {alone[name]} | {median:.1f} |")
    size, p = model.preprocessing.size, mcnemar(*alone.values())
    print(f"\n{len(plain)} photos of {options.megapixels:g} megapixels, input {size}; p = {p:.2f}")


if __name__ == "__main__":
    main()
