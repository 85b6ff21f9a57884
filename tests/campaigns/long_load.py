"""An artifact that is asked by several threads, about good and damaged images, on and on.

    python -m tests.campaigns.long_load RUN --images FOLDER --minutes 30

Every good image has first been asked about alone, by a classifier of its own. After that each answer is
compared with that one, and each damaged image is to be refused with its sentence, also when it comes among
good ones. One thread loads the artifact anew each time. What is watched: wrong answers, resident memory, open
files and threads. Linux only: it reads /proc. The exit code is 1 where an answer was wrong or memory grew.
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
AGREE = 1e-6
"""Probabilities of one image alone and in a batch may differ so much: sums in another order."""

GROWTH = 16e6
"""Bytes that the largest memory of the last third may lie above that of the second."""


@dataclass
class Load:
    """What all threads have seen."""

    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.counts[what] += number

    def fails(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


def damaged(good: bytes, folder: Path) -> list[Path | bytes]:
    """Images that cannot be answered for."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    made = {
        "empty.jpg": b"",
        "half.jpg": good[: len(good) // 2],
        "text.jpg": b"this is no image\n" * 50,
        "bomb.png": bomb,
        "zeros.webp": bytes(4096),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [*(folder / name for name in made), folder / "missing.jpg", folder, good[:100], b""]


def odd(folder: Path) -> list[Path]:
    """Images out of the ordinary that have an answer."""
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


def ask(
    classifier: Classifier,
    images: list[Path],
    refused: list[Path | bytes],
    load: Load,
    seed: int,
    rest: float,
) -> None:
    """Random batches, every fourth with a damaged image in it."""
    draw = random.Random(seed)
    while not load.stop.wait(rest):
        chosen = draw.choices(images, k=draw.choice((1, 1, 2, 5, 17)))
        if draw.random() < 0.25:
            asked: list[Path | bytes] = [*chosen, draw.choice(refused)]
            draw.shuffle(asked)
            try:
                classifier.predict(asked)
                load.fails(f"no error for {asked}")
            except ImageError as error:
                load.count("refused")
                if not str(error).startswith("cannot read "):
                    load.fails(f"an odd sentence: {error}")
            continue
        for file, found in zip(chosen, classifier.predict(chosen), strict=True):
            if not alike(found, EXPECTED[file]):
                load.fails(f"{file}: {found} instead of {EXPECTED[file]}")
        load.count("answered", len(chosen))


def load_again(artifact: Path, images: list[Path], load: Load) -> None:
    """A classifier that is loaded, asked once and dropped."""
    draw = random.Random(-1)
    while not load.stop.wait(0.5):
        file = draw.choice(images)
        if not alike(Classifier.load(artifact, threads=1).predict([file])[0], EXPECTED[file]):
            load.fails(f"{file}: another answer of a classifier just loaded")
        load.count("loaded anew")


def alike(one: Prediction, other: Prediction) -> bool:
    """The same classes in the same order, but where they are equally likely, and the same probabilities."""
    mine, theirs = dict(one.top), dict(other.top)
    pairs = zip([share for _, share in one.top], [share for _, share in other.top], strict=True)
    return all(abs(a - b) <= AGREE for a, b in pairs) and all(
        abs(mine[name] - theirs[name]) <= AGREE for name in mine.keys() & theirs.keys()
    )


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


EXPECTED: dict[Path, Prediction] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder or an artifact folder")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2, help="that ask one classifier")
    parser.add_argument("--rest", type=float, default=0, help="seconds after each batch, on a machine in use")
    options = parser.parse_args()
    files = [one for one in sorted(options.images.rglob("*")) if one.suffix.lower() in EXTENSIONS]
    images = random.Random(0).sample(files, min(200, len(files)))
    load = Load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = BytesIO()
        Image.new("RGB", (300, 200), "teal").save(good, "JPEG")
        images += odd(folder)
        (folder / "damaged").mkdir()
        refused = damaged(good.getvalue(), folder / "damaged")
        alone = Classifier.load(options.run, threads=1)
        EXPECTED.update({one: alone.predict([one])[0] for one in images})
        shared = Classifier.load(options.run, threads=1)
        threads = [
            *(
                threading.Thread(
                    target=guarded, args=(load, ask, shared, images, refused, load, seed, options.rest)
                )
                for seed in range(options.threads)
            ),
            threading.Thread(target=guarded, args=(load, load_again, options.run, images, load)),
        ]
        for thread in threads:
            thread.start()
        watched = watch(load, 60 * options.minutes)
        load.stop.set()
        for thread in threads:
            thread.join()
    told(load, watched, options)


def guarded(load: Load, work: object, *arguments: object) -> None:
    """A thread's error is a failure of the whole, and ends it."""
    try:
        work(*arguments)  # type: ignore[operator]
    except Exception as error:
        load.fails(f"{type(error).__name__}: {error}")
        load.stop.set()


def watch(load: Load, seconds: float) -> list[tuple[int, int, int]]:
    """(bytes resident, open files, threads), every second."""
    found = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not load.stop.wait(1.0):
        found.append((resident(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()))
        if len(found) % 60 == 0:
            print(f"{len(found) // 60} min: {found[-1][0] / 1e6:.1f} MB, {dict(load.counts)}", flush=True)
    return found


def told(load: Load, watched: list[tuple[int, int, int]], options: argparse.Namespace) -> None:
    if not watched:
        sys.exit("\n".join(load.wrong))
    third = max(1, len(watched) // 3)
    memory, files, threads = (list(column) for column in zip(*watched, strict=True))
    thirds = [max(memory[n * third : (n + 1) * third] or memory[-1:]) for n in range(3)]
    grew = thirds[2] - thirds[1]
    print(f"{len(watched) / 60:.1f} minutes, {options.threads} threads that ask, one that loads")
    print(", ".join(f"{number:,} {what}" for what, number in load.counts.items()))
    print(f"wrong: {len(load.wrong)}")
    for one in load.wrong[:10]:
        print(f"  {one}")
    print(f"most memory in each third: {', '.join(f'{one / 1e6:.1f} MB' for one in thirds)}")
    print(f"open files: {min(files)} to {max(files)}; threads of Python: {min(threads)} to {max(threads)}")
    sys.exit(bool(load.wrong) or grew > GROWTH)


if __name__ == "__main__":
    main()
