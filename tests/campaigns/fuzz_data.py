"""What fuzz.py feeds to the readers of data: images, labels files, shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path


def image_seeds() -> list[bytes]:
    import numpy as np
    from PIL import Image

    Image.init()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    kinds = (
        "PNG",
        "JPEG",
        "WEBP",
        "GIF",
        "TIFF",
        "BMP",
        "PPM",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "DDS",
        "ICNS",
        "DIB",
    )
    for kind in (*kinds, "JPEG2000", "AVIF", "MPO", "QOI"):
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "LAB", "F"):
            buffer = io.BytesIO()
            try:
                image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
                image = image.convert("I").convert("I;16") if mode == "I;16" else image
                image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            except (OSError, KeyError, ValueError):
                continue  # this format has no such mode, or this Pillow no such format
            seeds.append(buffer.getvalue())
    return seeds


def images(_work: Path) -> Callable[[bytes], None]:
    from questpress.export.runtime import ImageError, decode_image

    def read(content: bytes) -> None:
        try:
            pixels = decode_image(content)
        except ImageError:
            return
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and str(pixels.dtype) == "uint8"

    return read


def labels(suffix: str) -> Callable[[Path], Callable[[bytes], None]]:
    def make(work: Path) -> Callable[[bytes], None]:
        from questpress.pipeline.data.sources.label_files import read_coco, read_rows
        from questpress.pipeline.errors import UsageError

        file = work / f"labels.{suffix}"

        def read(content: bytes) -> None:
            file.write_bytes(content)
            try:
                read_coco(file) if suffix == "json" else read_rows(file)
            except UsageError as error:
                assert "\n" not in str(error)

        return read

    return make


def shard_seeds() -> list[bytes]:
    import tarfile

    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, content in (
                ("a/0.png", image_seeds()[0]),
                ("a/0.cls", b"1"),
                ("b.json", b'{"label": 1}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        seeds.append(buffer.getvalue())
    return seeds


def shards(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.data.sources.webdataset import index, local_splits
    from questpress.pipeline.errors import UsageError

    def read(content: bytes) -> None:
        (work / "train.tar").write_bytes(content)
        splits = local_splits(work)
        if splits is None:
            return
        try:
            found = index(splits)
        except UsageError as error:
            assert "\n" not in str(error)
            return
        assert all(len(image.read()) <= len(content) for images in found.given.values() for image in images)

    return read
