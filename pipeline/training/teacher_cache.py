"""Cached teacher outputs: computed once for fixed views, and read by every later epoch and run.

A view is a pure function of seed, image and view number, so a teacher's output for it can be cached: for
QuEST a few word indices per position, for a method on logits a row of logits. One entry of the cache holds
one kind of output of one teacher for one view of all images, as memory-mapped arrays:

    teacher-outputs/KEY/  about.json  map.ids.npy [N,P,m] uint16  map.p.npy [N,P,m] fp16  …

KEY is a hash of all that the output depends on: the teacher's weights and precision, the images and their
canonical form, the view policy, the view number, and the kind of output. An entry is complete or absent, and
its checksums are verified before it is read (``runs/cache.py``).
"""

import errno
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.augment import to_device
from ..errors import JobError
from ..methods.base import CachedOutput, Features
from ..report import format
from ..runs.cache import Cache
from ..runs.device import free_memory
from ..runs.hashes import digest
from .distributed import Ranks

KIND = "teacher-outputs"
ABOUT = "about.json"
SCHEMA = 1

BATCH = 128
"""Images per forward pass of a teacher: fixed, because outputs may differ in the last bits between sizes."""

DEVICE_FRACTION = 0.25
"""Fraction of the device's free memory that an epoch's outputs may take; otherwise they stay on the host."""

Render = Callable[[Iterable[Tensor], int], Iterator[Tensor]]
"""(batches of indices [B], view number) to those views, uint8 [B,3,H,W] on the teacher's device."""

RunTeacher = Callable[[Tensor, frozenset[str]], Features]
"""Views and names of features to those features."""


@dataclass(frozen=True)
class TeacherSource:
    """A teacher and the outputs to cache of it."""

    name: str
    dataset: str
    key: Mapping[str, Any]
    """All that outputs depend on besides the view: weights, precision, images, view policy."""
    outputs: Sequence[CachedOutput]
    load: Callable[[], RunTeacher]
    """Loads the teacher. Called only if an output is missing."""


class TeacherCache:
    """The outputs of a run's teachers for the views of its training images.

    Args:
        images: number of training images N.
        show: called with (work, images done, images) while outputs are computed.
    """

    def __init__(
        self,
        cache: Cache,
        sources: Sequence[TeacherSource],
        images: int,
        render: Render,
        show: Callable[[str, int, int], None],
        ranks: Ranks | None = None,
    ) -> None:
        self.cache, self.sources, self.images = cache, sources, images
        self.render, self.show, self.ranks = render, show, ranks or Ranks()
        self.computed = 0
        """Passes of a teacher over a view that were needed."""
        self._loaded: dict[int, RunTeacher] = {}
        self._open: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._on_device: list[dict[str, Tensor]] = []
        """Each teacher's arrays [V·N,…] of the V views ``_device_views``."""
        self._device_views = torch.empty(0, dtype=torch.int64)

    @property
    def bytes_per_view(self) -> int:
        return self.images * sum(o.bytes_per_image for source in self.sources for o in source.outputs)

    def key(self, t: int, output: CachedOutput, view: int) -> str:
        about = {"schema": SCHEMA, "images": self.images, "batch": BATCH, "view": view}
        arrays = {name: [list(shape), dtype] for name, (shape, dtype) in output.arrays.items()}
        return digest({**about, "source": self.sources[t].key, "output": output.key, "arrays": arrays})

    def find(self, t: int, view: int) -> list[Path | None]:
        """Return the entry of each output of a teacher for a view; None if it is absent or damaged."""
        return [self.cache.get(KIND, self.key(t, output, view)) for output in self.sources[t].outputs]

    def open(self, views: Sequence[int]) -> None:
        """Open the outputs for these views, and compute the missing ones."""
        for t, source in enumerate(self.sources):
            missing: dict[int, list[Path | None]] = {}
            for view in views:
                if (t, view) in self._open:
                    continue
                entries = self.ranks.broadcast(self.find(t, view) if self.ranks.is_main else None)
                if None in entries:
                    missing[view] = entries
                else:  # mapped at once: then it stays readable even if it is removed from the cache
                    self._map(t, view, entries)
            if not missing:
                self._loaded.pop(t, None)
                continue
            if t not in self._loaded:
                self._loaded[t] = source.load()
            for number, (view, entries) in enumerate(missing.items(), 1):
                name = "teacher" if len(self.sources) == 1 else f"teacher {t}"
                work = f"{name}: caching outputs, view {number}/{len(missing)}"
                self._map(t, view, self._compute(t, view, entries, work))

    def open_cached(self, views: range) -> None:
        """Open the outputs for these views that are cached."""
        for t in range(len(self.sources)):
            for view in views:
                if (t, view) not in self._open and None not in (entries := self.find(t, view)):
                    self._map(t, view, entries)

    def _map(self, t: int, view: int, entries: Sequence[Path | None]) -> None:
        self._open[t, view] = {
            name: array
            for output, entry in zip(self.sources[t].outputs, entries, strict=True)
            if entry is not None
            for name, array in map_arrays(entry, output).items()
        }

    def load_to_device(self, views: Sequence[int], device: torch.device) -> None:
        """Keep the outputs for these views only, in ascending order, on a device, if they fit."""
        if list(views) == self._device_views.tolist():
            return
        self._on_device, self._device_views = [], torch.tensor(views)
        if self.bytes_per_view * len(views) <= DEVICE_FRACTION * free_memory(str(device)):
            opened = [[self._open[t, view] for view in views] for t in range(len(self.sources))]
            self._on_device = [
                {name: _concatenate([arrays[name] for arrays in teacher], device) for name in teacher[0]}
                for teacher in opened
            ]

    def batch(self, indices: Tensor, views: Tensor, device: torch.device) -> list[Features]:
        """Return each teacher's outputs for opened views ``views`` of images ``indices``, int64 [B] both."""
        if self._on_device:
            rows = to_device(torch.searchsorted(self._device_views, views) * self.images + indices, device)
            return [{name: array[rows] for name, array in teacher.items()} for teacher in self._on_device]
        return [self._read_batch(t, indices, views, device) for t in range(len(self.sources))]

    def _read_batch(self, t: int, indices: Tensor, views: Tensor, device: torch.device) -> Features:
        batch: dict[str, np.ndarray] = {}
        for view in views.unique().tolist():
            at = (views == view).nonzero()[:, 0]
            for name, array in self._open[t, view].items():
                if name not in batch:
                    batch[name] = np.empty((len(indices), *array.shape[1:]), array.dtype)
                batch[name][at.numpy()] = array[indices[at].numpy()]
        return {name: to_device(_to_tensor(rows), device) for name, rows in batch.items()}

    def _compute(self, t: int, view: int, found: Sequence[Path | None], work: str) -> list[Path | None]:
        """Run a teacher over a view, write its missing outputs and return all entries."""
        self.computed += 1
        entries = list(found)
        missing = [o for o, entry in enumerate(found) if entry is None]
        if not self.ranks.is_main:
            while (folders := self.ranks.broadcast(None)) is not None:
                self._run_teacher(t, view, folders, work)
            return list(self.ranks.broadcast(None))

        def write(left: Sequence[int], folders: Mapping[int, Path]) -> None:
            if not left:
                for o, folder in folders.items():
                    create_arrays(folder, self.sources[t].outputs[o], self.images)
                self.ranks.broadcast(dict(folders))
                if self._run_teacher(t, view, folders, work):
                    raise JobError(
                        f"--cache {self.cache.root}: the disk is full; cached teacher outputs take "
                        f"{format.megabytes(self.bytes_per_view)} per view. Free space (compress cache "
                        "prune), use another folder, or cache fewer views with --cache-views (0 for none)."
                    )
                return
            o, *rest = left
            key = self.key(t, self.sources[t].outputs[o], view)
            # Nested, so that an entry is published only when the pass over all images has ended.
            entries[o] = self.cache.put(KIND, key, lambda folder: write(rest, {**folders, o: folder}))

        write(missing, {})
        self.ranks.broadcast(None)
        self.ranks.broadcast(entries)
        return entries

    def _run_teacher(self, t: int, view: int, folders: Mapping[int, Path], work: str) -> bool:
        """Compute and write this rank's part of the outputs; return True if the disk was full on any rank."""
        is_full = False
        try:
            self._write(t, view, folders, work)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            is_full = True
        # After this, every rank has written its part.
        if self.ranks.max([is_full])[0]:
            return True
        source = self.sources[t]
        if self.ranks.is_main:
            about = {
                "teacher": source.name,
                "data": source.dataset,
                "view": view,
                "images": self.images,
                "source": dict(source.key),
            }
            for o, folder in folders.items():
                write_about(folder, source.outputs[o], about)
        return False

    def _write(self, t: int, view: int, folders: Mapping[int, Path], work: str) -> None:
        source, run_teacher = self.sources[t], self._loaded[t]
        reads = frozenset[str]().union(*(source.outputs[o].reads for o in folders))
        with ExitStack() as stack:
            writers = {
                (o, name): stack.enter_context(closing(RowWriter(folder / f"{name}.npy", shape, dtype)))
                for o, folder in folders.items()
                for name, (shape, dtype) in source.outputs[o].arrays.items()
            }
            starts = range(0, self.images, BATCH)[self.ranks.rank :: self.ranks.count]
            batches = (torch.arange(start, min(start + BATCH, self.images)) for start in starts)
            for start, pixels in zip(starts, self.render(batches, view), strict=True):
                features = run_teacher(pixels, reads)
                for o in folders:
                    for name, values in source.outputs[o].compact(features).items():
                        writers[o, name].write(start, values, source.name)
                self.show(work, min(start + BATCH, self.images), self.images)

    def lost_mass(self) -> float | None:
        """Return the largest mean fraction of p_T that a cached view has lost; None without words."""
        lost = [lost_mass(arrays) for arrays in self._open.values()]
        return max((mass for mass in lost if mass is not None), default=None)


def create_arrays(folder: Path, output: CachedOutput, images: int) -> None:
    """Create the files of an output's arrays [images,…] with their headers only."""
    for name, (shape, dtype) in output.arrays.items():
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": descr, "fortran_order": False, "shape": (images, *shape)}
            )


class RowWriter:
    """Writes rows of such a file. Through a memory map, a full disk would kill the process."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        self.file = path.open("r+b")
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        self.offset = self.file.tell()

    def write(self, start: int, values: Tensor, teacher: str) -> None:
        """Write rows from ``start`` on, or raise JobError if a value does not fit into the type."""
        if self.dtype.kind == "f" and not bool(torch.isfinite(values.half()).all()):
            raise JobError(
                f"The outputs of {teacher} are not finite, or larger than 65,504 and so not representable in "
                "half precision. Check its weights, or train without cached outputs (--cache-views 0)."
            )
        self.file.seek(self.offset + start * self.row_bytes)
        self.file.write(np.ascontiguousarray(values.cpu().numpy().astype(self.dtype)).data)

    def close(self) -> None:
        self.file.close()


def write_about(folder: Path, output: CachedOutput, about: Mapping[str, Any]) -> None:
    """Write the description of an entry, the last of its files."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in output.arrays}
    content = {
        "schema": SCHEMA,
        **about,
        "bytes_per_image": output.bytes_per_image,
        "output": dict(output.key),
        "lost_mass": lost_mass(arrays),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / ABOUT).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def map_arrays(folder: Path, output: CachedOutput) -> dict[str, np.ndarray]:
    """Memory-map the arrays of an entry."""
    try:
        # Copy on write, since torch has no read-only tensors.
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in output.arrays}
    except FileNotFoundError as error:
        raise JobError(
            f"The cached teacher outputs {folder} were removed while they were opened. Run the same command "
            "again to compute them."
        ) from error


def _to_tensor(array: np.ndarray) -> Tensor:
    """Convert to a tensor; uint16 as int16, since torch supports few operations on uint16."""
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def _concatenate(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Copy arrays [N,…] to a tensor [len(arrays)·N,…] on a device."""
    parts = [_to_tensor(array) for array in arrays]
    rows = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, device=device)
    for row, part in zip(rows, parts, strict=True):
        row.copy_(part)
    return rows.flatten(0, 1)


def lost_mass(arrays: Mapping[str, np.ndarray]) -> float | None:
    """Return the largest mean fraction of p_T that the arrays have lost; None without words."""
    lost = [float(array.mean(dtype=np.float64)) for name, array in arrays.items() if name.endswith(".lost")]
    return max(lost, default=None)
