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

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..device import free_memory
from ..files import digest
from ..methods.base import Answer, Readout
from ..ranks import Ranks
from .entry import SCHEMA, Rows, create, describe, mapped

KIND = "answers"
BATCH = 128
"""Images a teacher answers at once: always the same, so that an answer does not depend on who asks."""

ON_DEVICE = 0.25
"""Share of the device's free memory that an epoch's answers may take; more of them stay on the host."""

Render = Callable[[Tensor, int], Tensor]
"""(indices [B], view number) to those views, uint8 [B,3,S,S] on the teacher's device."""

Ask = Callable[[Tensor, frozenset[str]], Readout]
"""A teacher: views and the readouts wanted, to those readouts."""


@dataclass(frozen=True)
class Source:
    """One teacher in a store."""

    name: str
    key: Mapping[str, Any]
    """All that its answers depend on besides the view: weights, arithmetic, images, how views are drawn."""
    answers: Sequence[Answer]
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
        self._open: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._resident: dict[tuple[int, int], dict[str, Tensor]] = {}

    @property
    def bytes_per_view(self) -> int:
        return self.images * sum(a.bytes_per_image for source in self.sources for a in source.answers)

    def key(self, t: int, answer: Answer, view: int) -> str:
        about = {"schema": SCHEMA, "images": self.images, "batch": BATCH, "view": view}
        return digest({**about, "source": self.sources[t].key, "answer": answer.key})

    def find(self, t: int, view: int) -> list[Path | None]:
        """The entry of each of a teacher's answers to a view; None where there is none, or a damaged one."""
        return [self.cache.get(KIND, self.key(t, a, view)) for a in self.sources[t].answers]

    def open(self, views: range) -> None:
        """Have the answers to these views at hand; what is missing is computed.

        Raises:
            JobError: an answer does not fit into half precision, or there is no room for it.
        """
        for t, source in enumerate(self.sources):
            wanted = [view for view in views if (t, view) not in self._open]
            found: dict[int, list[Path | None]] = self.ranks.share(
                {view: self.find(t, view) for view in wanted} if self.ranks.lead else None
            )
            missing = [view for view, places in found.items() if None in places]
            if missing:
                ask = source.load()
                for number, view in enumerate(missing, 1):
                    what = f"asking {source.name}, view {number} of {len(missing)}"
                    found[view] = self._computed(t, view, found[view], ask, what)
            for view, places in found.items():
                parts = [mapped(place, a) for a, place in zip(source.answers, places, strict=True) if place]
                self._open[t, view] = {name: array for part in parts for name, array in part.items()}

    def batch(self, indices: Tensor, views: Tensor, device: torch.device) -> list[Readout]:
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
                self._resident[at] = {name: torch.from_numpy(array).to(device) for name, array in arrays}

    def _batch(
        self, t: int, indices: Tensor, views: Tensor, present: Sequence[int], device: torch.device
    ) -> Readout:
        if len(present) == 1:
            return self._rows(t, present[0], indices, device)
        batch: dict[str, Tensor] = {}
        for view in present:
            where = (views == view).nonzero()[:, 0]
            for name, rows in self._rows(t, view, indices[where], device).items():
                if name not in batch:
                    batch[name] = rows.new_empty((len(indices), *rows.shape[1:]))
                batch[name][where.to(rows.device)] = rows
        return batch

    def _rows(self, t: int, view: int, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        resident = self._resident.get((t, view))
        if resident is not None:
            on_device = indices.to(device, non_blocking=True)
            return {name: array[on_device] for name, array in resident.items()}
        chosen = indices.numpy()
        rows = {name: torch.from_numpy(array[chosen]) for name, array in self._open[t, view].items()}
        if device.type == "cuda":
            return {name: part.pin_memory().to(device, non_blocking=True) for name, part in rows.items()}
        return {name: part.to(device) for name, part in rows.items()}

    def _computed(
        self, t: int, view: int, found: Sequence[Path | None], ask: Ask, what: str
    ) -> list[Path | None]:
        """The entries after one pass of a teacher over a view, for all the answers that are missing."""
        self.computed += 1
        places = list(found)
        missing = [a for a, place in enumerate(found) if place is None]
        if not self.ranks.lead:
            while (folders := self.ranks.share(None)) is not None:
                self._pass(t, view, folders, ask, what)
            return list(self.ranks.share(None))

        def write(left: Sequence[int], folders: Mapping[int, Path]) -> None:
            if not left:
                for a, folder in folders.items():
                    create(folder, self.sources[t].answers[a], self.images)
                self.ranks.share(dict(folders))
                self._pass(t, view, folders, ask, what)
                return
            a, *rest = left
            key = self.key(t, self.sources[t].answers[a], view)
            # Each entry is whole only when the pass inside has ended, and then they all are.
            places[a] = self.cache.put(KIND, key, lambda folder: write(rest, {**folders, a: folder}))

        write(missing, {})
        self.ranks.share(None)
        self.ranks.share(places)
        return places

    def _ask_about(self, t: int, view: int, folders: Mapping[int, Path], ask: Ask, what: str) -> None:
        """Ask about this rank's share of the batches, and write down what is said."""
        source = self.sources[t]
        reads = frozenset[str]().union(*(source.answers[a].reads for a in folders))
        with ExitStack() as files:
            into = {
                (a, name): files.enter_context(Rows(folder / f"{name}.npy", shape, kind))
                for a, folder in folders.items()
                for name, (shape, kind) in source.answers[a].arrays.items()
            }
            starts = range(0, self.images, BATCH)
            for start in starts[self.ranks.number :: self.ranks.count]:
                readout = ask(self.render(self.batch_at(start), view), reads)
                for a in folders:
                    for name, values in source.answers[a].compact(readout).items():
                        into[a, name].write(start, values, source.name)
                self.show(what, min(start + BATCH, self.images), self.images)

    def _pass(self, t: int, view: int, folders: Mapping[int, Path], ask: Ask, what: str) -> None:
        """All images: this rank's share of them, and the others theirs.

        Raises:
            OSError: on rank 0, where a rank could not write.
        """
        source, refusal = self.sources[t], None
        try:
            self._ask_about(t, view, folders, ask, what)
        except OSError as error:
            refusal = error
        # Also says that all have written.
        if self.ranks.most([refusal is not None])[0]:
            if self.ranks.lead:
                raise refusal or OSError("another process could not write there")
            return
        if self.ranks.lead:
            about = {"teacher": source.name, "view": view, "images": self.images, "source": dict(source.key)}
            for a, folder in folders.items():
                describe(folder, source.answers[a], about)

    def batch_at(self, start: int) -> Tensor:
        """The images that are asked about together, from ``start`` on."""
        return torch.arange(start, min(start + BATCH, self.images))

    def lost_mass(self) -> float | None:
        """The largest mean share of p_T that the answers to an open view have lost; None without words."""
        lost = [
            float(array.mean(dtype=np.float64))
            for arrays in self._open.values()
            for name, array in arrays.items()
            if name.endswith(".lost")
        ]
        return max(lost, default=None)
