"""The store of a run: what its answers depend on, and how a missing one is computed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ..data.render import Views
from ..data.schedule import FIXED_SEED, Schedule
from ..data.streamed import StreamedViews
from ..device import Engine
from ..files import digest
from ..job import Job
from ..methods.base import Answer, Method
from ..trained import load_teacher, teacher_digest
from .store import Source, Store


def schedule_of(job: Job) -> Schedule:
    """Which views the student is shown."""
    return Schedule(job.policy, job.options.seed, job.options.store_views or None)


def store_of(
    job: Job, methods: Mapping[str, Method], views: Views | StreamedViews, answering: Engine
) -> Store:
    """The answers that these methods want of the run's teachers.

    Args:
        views: those that the student is trained on.
        answering: what the teachers compute with.
    """

    def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, _ in views.batches(plan, job.device))

    def show(what: str, done: int, total: int) -> None:
        job.stage.update(what, done, total, "images")

    def source(t: int) -> Source:
        return Source(
            job.teachers[t],
            job.data.name,
            _key(job, t, answering),
            _answers(methods, t),
            partial(load_teacher, job, t, answering),
        )

    return Store(
        job.cache, [source(t) for t in range(len(job.teachers))], len(views), render, show, job.ranks
    )


def _answers(methods: Mapping[str, Method], t: int) -> Sequence[Answer]:
    """What all methods want, each thing once."""
    wanted: dict[str, Answer] = {}
    for method in methods.values():
        for answer in method.answers(t):
            wanted.setdefault(digest(answer.key), answer)
    return list(wanted.values())


def _key(job: Job, t: int, answering: Engine) -> dict[str, object]:
    geometry = job.geometry(job.teachers[t])
    return {
        "weights": teacher_digest(job, t),
        "architecture": job.teachers[t],
        "precision": answering.precision,
        "mean": list(geometry.mean),
        "std": list(geometry.std),
        "images": digest(job.train.keys.tolist()),
        "form": job.form,
        "policy": asdict(job.policy),
        "seed": FIXED_SEED,
        "size": job.image_size,
    }
