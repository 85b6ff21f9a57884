"""The store of a run: what its answers depend on, and how a missing one is computed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from ..data.schedule import FIXED_SEED, Schedule
from ..methods.base import Answer, Method
from ..runs.device import Engine
from ..runs.files import digest
from ..trained import load_teacher, weights_digest
from ..training.job import Job, Member
from ..training.teacher_cache import Source, Store


def schedule_of(job: Job) -> Schedule:
    """Which views the student is shown."""
    return Schedule(job.policy, job.seed, job.options.store_views or None)


def store_of(job: Job, methods: Mapping[str, Method], answering: Engine) -> Store:
    """The answers that these methods want of the run's teachers, who compute with ``answering``."""
    views = job.views_drawn_with(schedule_of(job).view_seed, job.tutors[0].image_size)

    def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, *_ in views.batches(plan, job.device))

    def show(what: str, done: int, total: int) -> None:
        job.stage.update(what, done, total, "images")

    def source(t: int, tutor: Member) -> Source:
        return Source(
            tutor.name,
            job.data.name,
            _key(job, tutor, answering),
            _answers(methods, t),
            partial(load_teacher, job, tutor, answering),
        )

    sources = [source(t, tutor) for t, tutor in enumerate(job.tutors)]
    return Store(job.cache, sources, len(views), render, show, job.ranks)


def _answers(methods: Mapping[str, Method], t: int) -> Sequence[Answer]:
    """What all methods want, each thing once."""
    wanted: dict[str, Answer] = {}
    for method in methods.values():
        for answer in method.answers(t):
            wanted.setdefault(digest(answer.key), answer)
    return list(wanted.values())


def _key(job: Job, tutor: Member, answering: Engine) -> dict[str, object]:
    geometry = job.geometry(tutor)
    return {
        "weights": weights_digest(job, tutor),
        "architecture": tutor.name,
        "precision": answering.precision,
        "mean": list(geometry.mean),
        "std": list(geometry.std),
        "images": digest(job.train.keys.tolist()),
        "form": job.form,
        "policy": asdict(job.policy),
        "seed": FIXED_SEED,
        "size": tutor.image_size,
    }
