"""The teacher store: what teachers say to fixed views, computed once and read by every later epoch and run.

A view is a pure function of seed, image and view number, so its answer can be kept: QuEST's is a handful of
word numbers for each position, a logit method's a row of logits. One entry of the cache holds one part of one
teacher's answers to one view of all images, as memory-mapped arrays:

    answers/KEY/  about.json  map.ids.npy [N,P,m] uint16  map.p.npy [N,P,m] fp16  …

KEY is a hash of all that the answers depend on: the teacher's weights and arithmetic, the images and the form
they are kept in, how views are drawn, the view's number, and what is kept of the readout. An entry appears
whole or not at all, and its checksums are verified before it is read (``cache.py``): a view whose computation
was interrupted is computed anew.
"""

import errno
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.render import to_device
from ..data.views import FIXED_SEED, Schedule
from ..errors import JobError
from ..methods.base import CachedOutput, Method, Features
from ..report import format
from ..runs.cache import Cache
from ..runs.device import Engine, free_memory
from ..runs.files import digest
from .compute.distributed import Ranks
from .job import Job, NetworkSpec
from .weights import load_teacher, weights_digest

ABOUT = "about.json"
SCHEMA = 1


def create(folder: Path, answer: CachedOutput, images: int) -> None:
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
                "cannot hold: check its weights, or train without a store (--cache-views 0)."
            )
        self.file.seek(self.begins + start * self.row)
        self.file.write(np.ascontiguousarray(values.cpu().numpy().astype(self.kind)).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def describe(folder: Path, answer: CachedOutput, about: Mapping[str, Any]) -> None:
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


def mapped(folder: Path, answer: CachedOutput) -> dict[str, np.ndarray]:
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


KIND = "answers"
BATCH = 128
"""Images a teacher answers at once: always the same, so that an answer does not depend on who asks."""

ON_DEVICE = 0.25
"""Share of the device's free memory that an epoch's answers may take; more of them stay on the host."""

Render = Callable[[Iterable[Tensor], int], Iterator[Tensor]]
"""(batches of indices [B], view number) to those views, uint8 [B,3,S,S] each on the teacher's device."""

Ask = Callable[[Tensor, frozenset[str]], Features]
"""A teacher: views and the readouts wanted, to those readouts."""


@dataclass(frozen=True)
class Source:
    """One teacher in a store."""

    name: str
    data: str
    """What the images are called."""
    key: Mapping[str, Any]
    """All that its answers depend on besides the view: weights, arithmetic, images, how views are drawn."""
    answers: Sequence[CachedOutput]
    load: Callable[[], Ask]
    """The teacher itself, wanted only where something is missing."""


class Store:
    """The answers of a run's teachers to the views of its training images."""

    def __init__(
        self,
        cache: Cache,
        sources: Sequence[Source],
        images: int,
        render: Render,
        show: Callable[[str, int, int], None],
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            images: N, how many training images there are.
            show: called with (what is done, images done, images in all) while answers are computed.
        """
        self.cache, self.sources, self.images = cache, sources, images
        self.render, self.show, self.ranks = render, show, ranks or Ranks()
        self.computed = 0
        """Passes of a teacher over a view that this store has had to make."""
        self._asked: dict[int, Ask] = {}
        """Teachers that are loaded: each as long as the views that are opened miss something of it."""
        self._open: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._resident: dict[tuple[int, int], dict[str, Tensor]] = {}

    @property
    def bytes_per_view(self) -> int:
        return self.images * sum(a.bytes_per_image for source in self.sources for a in source.answers)

    def key(self, t: int, answer: CachedOutput, view: int) -> str:
        about = {"schema": SCHEMA, "images": self.images, "batch": BATCH, "view": view}
        arrays = {name: [list(shape), kind] for name, (shape, kind) in answer.arrays.items()}
        return digest({**about, "source": self.sources[t].key, "answer": answer.key, "arrays": arrays})

    def find(self, t: int, view: int) -> list[Path | None]:
        """The entry of each of a teacher's answers to a view; None where there is none, or a damaged one."""
        return [self.cache.get(KIND, self.key(t, a, view)) for a in self.sources[t].answers]

    def open(self, views: range) -> None:
        """Have the answers to these views at hand; what is missing is computed.

        Raises:
            JobError: an answer does not fit into half precision, or there is no room for it.
        """
        for t, source in enumerate(self.sources):
            missing: dict[int, list[Path | None]] = {}
            for view in views:
                if (t, view) in self._open:
                    continue
                places = self.ranks.share(self.find(t, view) if self.ranks.is_main else None)
                if None in places:
                    missing[view] = places
                else:
                    # At once: what is mapped stays readable, whoever removes it from the cache meanwhile.
                    self._map(t, view, places)
            if not missing:
                self._asked.pop(t, None)
                continue
            if t not in self._asked:
                self._asked[t] = source.load()
            ask = self._asked[t]
            for number, (view, places) in enumerate(missing.items(), 1):
                what = f"asking {source.name}, view {number} of {len(missing)}"
                self._map(t, view, self._computed(t, view, places, ask, what))

    def look_up(self, views: range) -> None:
        """Have the answers to these views at hand too, as far as they are stored."""
        for t in range(len(self.sources)):
            for view in views:
                if (t, view) not in self._open and None not in (places := self.find(t, view)):
                    self._map(t, view, places)

    def _map(self, t: int, view: int, places: Sequence[Path | None]) -> None:
        parts = [
            mapped(place, answer)
            for answer, place in zip(self.sources[t].answers, places, strict=True)
            if place is not None
        ]
        self._open[t, view] = {name: array for part in parts for name, array in part.items()}

    def batch(self, indices: Tensor, views: Tensor, device: torch.device) -> list[Features]:
        """Each teacher's answers to the opened views ``views`` of images ``indices`` (int64 [B] both)."""
        present = views.unique().tolist()
        return [self._batch(t, indices, views, present, device) for t in range(len(self.sources))]

    def make_resident(self, views: range, device: torch.device) -> None:
        """Keep the answers to these views, and to no others, on a GPU where they fit."""
        for at in [at for at in self._resident if at[1] not in views]:
            del self._resident[at]
        if device.type == "cpu" or self.bytes_per_view * len(views) > ON_DEVICE * free_memory(str(device)):
            return
        for at in [(t, view) for t in range(len(self.sources)) for view in views]:
            if at not in self._resident:
                arrays = self._open[at].items()
                self._resident[at] = {name: tensor(array).to(device) for name, array in arrays}

    def _batch(
        self, t: int, indices: Tensor, views: Tensor, present: Sequence[int], device: torch.device
    ) -> Features:
        if len(present) == 1:
            return self._rows(t, present[0], indices, device)
        batch: dict[str, Tensor] = {}
        for view in present:
            where = (views == view).nonzero()[:, 0]
            for name, rows in self._rows(t, view, indices[where], device).items():
                if name not in batch:
                    batch[name] = rows.new_empty((len(indices), *rows.shape[1:]))
                batch[name][to_device(where, device)] = rows
        return batch

    def _rows(self, t: int, view: int, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        resident = self._resident.get((t, view))
        if resident is not None:
            on_device = to_device(indices, device)
            return {name: array[on_device] for name, array in resident.items()}
        chosen = indices.numpy()
        arrays = self._open[t, view].items()
        return {name: to_device(tensor(array[chosen]), device) for name, array in arrays}

    def _computed(
        self, t: int, view: int, found: Sequence[Path | None], ask: Ask, what: str
    ) -> list[Path | None]:
        """The entries after one pass of a teacher over a view, for all the answers that are missing.

        Raises:
            JobError: there is no room for them.
        """
        self.computed += 1
        places = list(found)
        missing = [a for a, place in enumerate(found) if place is None]
        if not self.ranks.is_main:
            while (folders := self.ranks.share(None)) is not None:
                self._pass(t, view, folders, ask, what)
            return list(self.ranks.share(None))

        def write(left: Sequence[int], folders: Mapping[int, Path]) -> None:
            if not left:
                for a, folder in folders.items():
                    create(folder, self.sources[t].answers[a], self.images)
                self.ranks.share(dict(folders))
                if self._pass(t, view, folders, ask, what):
                    raise self._no_room()
                return
            a, *rest = left
            key = self.key(t, self.sources[t].answers[a], view)
            # Each entry is whole only when the pass inside has ended, and then they all are.
            places[a] = self.cache.put(KIND, key, lambda folder: write(rest, {**folders, a: folder}))

        write(missing, {})
        self.ranks.share(None)
        self.ranks.share(places)
        return places

    def _no_room(self) -> JobError:
        return JobError(
            f"There is no room in {self.cache.root} for the teachers' answers, "
            f"{format.megabytes(self.bytes_per_view)} for each view: free some (compress store prune), name "
            "another folder with --cache, store fewer views with --cache-views, or none with --cache-views 0."
        )

    def _pass(self, t: int, view: int, folders: Mapping[int, Path], ask: Ask, what: str) -> bool:
        """Ask about all images, this rank's share of the batches, and write down what is said.

        Returns:
            Whether the disk was full, for this rank or another.
        """
        full = False
        try:
            self._write(t, view, folders, ask, what)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = True
        # Here every rank has written its share.
        if self.ranks.most([full])[0]:
            return True
        source = self.sources[t]
        if self.ranks.is_main:
            about = {
                "teacher": source.name,
                "data": source.data,
                "view": view,
                "images": self.images,
                "source": dict(source.key),
            }
            for a, folder in folders.items():
                describe(folder, source.answers[a], about)
        return False

    def _write(self, t: int, view: int, folders: Mapping[int, Path], ask: Ask, what: str) -> None:
        source = self.sources[t]
        reads = frozenset[str]().union(*(source.answers[a].reads for a in folders))
        with ExitStack() as files:
            into = {
                (a, name): files.enter_context(Rows(folder / f"{name}.npy", shape, kind))
                for a, folder in folders.items()
                for name, (shape, kind) in source.answers[a].arrays.items()
            }
            starts = self.starts[self.ranks.number :: self.ranks.count]
            for start, pixels in zip(starts, self.render(map(self.batch_at, starts), view), strict=True):
                readout = ask(pixels, reads)
                for a in folders:
                    for name, values in source.answers[a].compact(readout).items():
                        into[a, name].write(start, values, source.name)
                self.show(what, min(start + BATCH, self.images), self.images)

    @property
    def starts(self) -> range:
        """The first images of what is asked about together."""
        return range(0, self.images, BATCH)

    def batch_at(self, start: int) -> Tensor:
        """The images that are asked about together, from ``start`` on."""
        return torch.arange(start, min(start + BATCH, self.images))

    def lost_mass(self) -> float | None:
        """The largest mean share of p_T that the answers to an open view have lost; None without words."""
        lost = [lost_mass(arrays) for arrays in self._open.values()]
        return max((one for one in lost if one is not None), default=None)


def schedule_of(job: Job) -> Schedule:
    """Which views the student is shown."""
    return Schedule(job.policy, job.seed, job.options.cache_views or None)


def store_of(job: Job, methods: Mapping[str, Method], answering: Engine) -> Store:
    """The answers that these methods want of the run's teachers, who compute with ``answering``."""
    views = job.views_drawn_with(schedule_of(job).view_seed, job.current_teachers[0].image_size)

    def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, *_ in views.batches(plan, job.device))

    def show(what: str, done: int, total: int) -> None:
        job.stage.update(what, done, total, "images")

    def source(t: int, teacher: NetworkSpec) -> Source:
        return Source(
            teacher.name,
            job.data.name,
            _key(job, teacher, answering),
            _answers(methods, t),
            partial(load_teacher, job, teacher, answering),
        )

    sources = [source(t, teacher) for t, teacher in enumerate(job.current_teachers)]
    return Store(job.cache, sources, len(views), render, show, job.ranks)


def _answers(methods: Mapping[str, Method], t: int) -> Sequence[CachedOutput]:
    """What all methods want, each thing once."""
    wanted: dict[str, CachedOutput] = {}
    for method in methods.values():
        for answer in method.answers(t):
            wanted.setdefault(digest(answer.key), answer)
    return list(wanted.values())


def _key(job: Job, teacher: NetworkSpec, answering: Engine) -> dict[str, object]:
    geometry = job.geometry(teacher)
    return {
        "weights": weights_digest(job, teacher),
        "architecture": teacher.name,
        "precision": answering.precision,
        "mean": list(geometry.mean),
        "std": list(geometry.std),
        "images": digest(job.train.keys.tolist()),
        "form": job.form,
        "policy": asdict(job.policy),
        "seed": FIXED_SEED,
        "size": teacher.image_size,
    }
