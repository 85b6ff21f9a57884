"""One entry of the store on disk: arrays of rows in numpy's file format, and what they are."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import JobError
from ..methods.base import Answer

ABOUT = "about.json"
SCHEMA = 1


def create(folder: Path, answer: Answer, images: int) -> None:
    """The files of an answer's arrays [images,…], with their headers and nothing else yet."""
    for name, (shape, kind) in answer.arrays.items():
        descr = np.lib.format.dtype_to_descr(np.dtype(kind))
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": descr, "fortran_order": False, "shape": (images, *shape)}
            )


class Rows:
    """One of these files, written by rows.

    Written as a file and not through a memory map, through which a full disk would kill the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], kind: str) -> None:
        self.kind = np.dtype(kind)
        self.row = math.prod(shape) * self.kind.itemsize
        self.file = path.open("r+b")
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.begins = self.file.tell()

    def write(self, start: int, values: Tensor, teacher: str) -> None:
        """Rows from ``start`` on.

        Raises:
            JobError: the numbers do not fit into the type.
            OSError: the disk is full.
        """
        if self.kind.kind == "f" and not bool(torch.isfinite(values.half()).all()):
            raise JobError(
                f"{teacher} answers with numbers that are not finite or beyond 65,504, which half precision "
                "cannot hold: check its weights, or train without a store (--store-views 0)."
            )
        self.file.seek(self.begins + start * self.row)
        self.file.write(np.ascontiguousarray(values.cpu().numpy().astype(self.kind)).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def describe(folder: Path, answer: Answer, about: Mapping[str, Any]) -> None:
    """Write what the entry is: the last of its files."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in answer.arrays}
    content = {
        "schema": SCHEMA,
        **about,
        "bytes_per_image": answer.bytes_per_image,
        "answer": dict(answer.key),
        "lost_mass": lost_mass(arrays),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / ABOUT).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def mapped(folder: Path, answer: Answer) -> dict[str, np.ndarray]:
    """The arrays, memory-mapped."""
    with suppress(OSError):  # where the cache may only be read
        (folder / ABOUT).touch()  # when it was last used, for `compress store prune`
    try:
        # Copy on write: torch knows no read-only tensors, and nothing must ever change the files.
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in answer.arrays}
    except OSError as error:  # verified a moment ago
        raise JobError(
            f"The stored answers {folder} were removed as they were about to be read; the same command "
            "computes them again."
        ) from error


def tensor(array: np.ndarray) -> Tensor:
    """An array as torch's; numbers of 16 bits as int16, with which torch can do more than with uint16."""
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def lost_mass(arrays: Mapping[str, np.ndarray]) -> float | None:
    """The largest mean share of p_T that the arrays have lost; None where they hold no words."""
    lost = [float(array.mean(dtype=np.float64)) for name, array in arrays.items() if name.endswith(".lost")]
    return max(lost, default=None)
