"""Load one artifact from several threads, with good and damaged images, and watch memory and results.

    python -m tests.campaigns.long_load RUN --images FOLDER --minutes 30

Each image is first classified alone. Later predictions are compared with these, and damaged images must be
rejected with an error, also within a batch of good ones. One more thread loads the artifact again and again.
Linux only, since it reads /proc. The exit code is 1 if a prediction was wrong or memory grew.
"""

import argparse
import os
import random
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from questpress.export.runtime import Classifier, ImageError, Prediction

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TOLERANCE = 1e-6
"""Difference of the probabilities of an image alone and in a batch: sums have another order."""

GROWTH = 16e6
"""Bytes by which the peak of the last third may exceed that of the second."""


@dataclass
class Load:
    """Counts and failures of all threads."""

    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.counts[what] += number

    def fail(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


def make_damaged_images(good: bytes, folder: Path) -> list[Path | bytes]:
    """Write images that must be rejected."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    made = {
        "empty.jpg": b"",
        "half.jpg": good[: len(good) // 2],
        "text.jpg": b"this is not an image\n" * 50,
        "bomb.png": bomb,
        "zeros.webp": bytes(4096),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [*(folder / name for name in made), folder / "missing.jpg", folder, good[:100], b""]


def make_unusual_images(folder: Path) -> list[Path]:
    """Write valid images of unusual modes and sizes."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    plain = Image.fromarray(pixels)
    frames = [Image.fromarray(np.roll(pixels, 7 * n, axis=0)) for n in range(4)]
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.convert("P").save(folder / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / "alpha.png")
    plain.resize((1, 1)).save(folder / "one.png")
    plain.resize((1500, 3)).save(folder / "long.bmp")
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return sorted(folder.iterdir())


def predict_batches(
    classifier: Classifier,
    images: list[Path],
    rejected: list[Path | bytes],
    load: Load,
    seed: int,
    rest: float,
) -> None:
    """Classify random batches; a fourth of them contains a damaged image."""
    draw = random.Random(seed)
    while not load.stop.wait(rest):
        chosen = draw.choices(images, k=draw.choice((1, 1, 2, 5, 17)))
        if draw.random() < 0.25:
            batch: list[Path | bytes] = [*chosen, draw.choice(rejected)]
            draw.shuffle(batch)
            try:
                classifier.predict(batch)
                load.fail(f"no error for {batch}")
            except ImageError as error:
                load.count("rejected")
                if not str(error).startswith("cannot read "):
                    load.fail(f"unexpected message: {error}")
            continue
        for file, prediction in zip(chosen, classifier.predict(chosen), strict=True):
            if not is_equal(prediction, EXPECTED[file]):
                load.fail(f"{file}: {prediction} instead of {EXPECTED[file]}")
        load.count("predicted", len(chosen))


def reload_artifact(artifact: Path, images: list[Path], load: Load) -> None:
    """Load a classifier, use it once and drop it, repeatedly."""
    draw = random.Random(-1)
    while not load.stop.wait(0.5):
        file = draw.choice(images)
        if not is_equal(Classifier.load(artifact, threads=1).predict([file])[0], EXPECTED[file]):
            load.fail(f"{file}: a classifier loaded again differs")
        load.count("loaded")


def is_equal(first: Prediction, second: Prediction) -> bool:
    """Return True if classes, their order and probabilities agree; equally likely classes may be swapped."""
    p, q = dict(first.top), dict(second.top)
    pairs = zip([value for _, value in first.top], [value for _, value in second.top], strict=True)
    return all(abs(a - b) <= TOLERANCE for a, b in pairs) and all(
        abs(p[name] - q[name]) <= TOLERANCE for name in p.keys() & q.keys()
    )


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


EXPECTED: dict[Path, Prediction] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder or an artifact folder")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2, help="threads that share a classifier")
    parser.add_argument("--rest", type=float, default=0, help="pause after each batch, seconds")
    options = parser.parse_args()
    files = [path for path in sorted(options.images.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    images = random.Random(0).sample(files, min(200, len(files)))
    load = Load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = BytesIO()
        Image.new("RGB", (300, 200), "teal").save(good, "JPEG")
        images += make_unusual_images(folder)
        (folder / "damaged").mkdir()
        rejected = make_damaged_images(good.getvalue(), folder / "damaged")
        alone = Classifier.load(options.run, threads=1)
        EXPECTED.update({path: alone.predict([path])[0] for path in images})
        shared = Classifier.load(options.run, threads=1)
        threads = [
            *(
                threading.Thread(
                    target=run_guarded,
                    args=(load, predict_batches, shared, images, rejected, load, seed, options.rest),
                )
                for seed in range(options.threads)
            ),
            threading.Thread(target=run_guarded, args=(load, reload_artifact, options.run, images, load)),
        ]
        for thread in threads:
            thread.start()
        samples = sample(load, 60 * options.minutes)
        load.stop.set()
        for thread in threads:
            thread.join()
    report(load, samples, options)


def run_guarded(load: Load, work: object, *arguments: object) -> None:
    """Run a thread's work; an error is recorded and stops all threads."""
    try:
        work(*arguments)  # type: ignore[operator]
    except Exception as error:
        load.fail(f"{type(error).__name__}: {error}")
        load.stop.set()


def sample(load: Load, seconds: float) -> list[tuple[int, int, int]]:
    """Return resident bytes, open files and threads once a second."""
    samples = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and not load.stop.wait(1.0):
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        samples.append((read_resident_bytes(), open_files, threading.active_count()))
        if len(samples) % 60 == 0:
            memory = samples[-1][0] / 1e6
            print(f"{len(samples) // 60} min: {memory:.1f} MB, {dict(load.counts)}", flush=True)
    return samples


def report(load: Load, samples: list[tuple[int, int, int]], options: argparse.Namespace) -> None:
    if not samples:
        sys.exit("\n".join(load.wrong))
    third = max(1, len(samples) // 3)
    memory, files, threads = (list(column) for column in zip(*samples, strict=True))
    thirds = [max(memory[n * third : (n + 1) * third] or memory[-1:]) for n in range(3)]
    grew = thirds[2] - thirds[1]
    print(f"{len(samples) / 60:.1f} minutes, {options.threads} threads that predict, one that loads")
    print(", ".join(f"{number:,} {what}" for what, number in load.counts.items()))
    print(f"wrong: {len(load.wrong)}")
    for failure in load.wrong[:10]:
        print(f"  {failure}")
    print(f"peak memory of each third: {', '.join(f'{peak / 1e6:.1f} MB' for peak in thirds)}")
    print(f"open files: {min(files)} to {max(files)}; threads of Python: {min(threads)} to {max(threads)}")
    sys.exit(bool(load.wrong) or grew > GROWTH)


if __name__ == "__main__":
    main()
