"""student: the small network learns from the teachers; what ships is a plain timm state_dict."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ...models.checkpoint import save_weights
from ...models.readout import Readouts
from ...models.widen import widen
from .. import evaluate, methods
from ..data.image_set import Role
from ..device import Engine, choose_engine, inference_engine, use_threads
from ..files import whole
from ..job import Job
from ..learning import engine, learn, plan
from ..methods.base import Method
from ..networks import parameters, start, student_source
from ..report import figures
from ..results import BalancedWeight, Round, StoreUse, Subject
from ..run_folder import Done
from ..store.of_run import schedule_of, store_of
from ..store.store import Store
from ..task import DistillationTask, Teacher
from ..trained import load_teacher, weights_metadata


def run(job: Job) -> Done:
    o, member = job.options, job.student
    name = member.name
    assert o.epochs and o.lr and o.warmup_epochs is not None
    with job.ranks.lead_first():  # the others find downloaded weights
        begun = start(
            name,
            student_source(name, o.student_weights, job.display.note),
            "auto",
            job.data.classes,
            member.image_size,
            job.seed,
            job.display.note,
            role="student",
        )
    chosen = engine(job, job.training, lambda asked: choose_engine(job.device, asked, begun.network))
    use_threads(chosen.threads)
    task, store = _task(job, begun.network, chosen)
    learning = plan(job, epochs=o.epochs, lr=o.lr, warmup_epochs=o.warmup_epochs, seed=job.seed)
    if store is not None:
        _say_store(job, store)
    learn(job, task, learning, what=job.training, member=member, views_of=schedule_of(job), store=store)
    balanced = task.balanced()
    for one in balanced:
        if one.factor != 1:
            job.display.note(_told(one))
    compared = {one.method for one in balanced}
    for method in task.trainee.methods:
        if o.balance == "auto" and method not in compared:
            job.display.note(
                f"the weight of {method} is left as it is: its gradients and those of the labels meet in no "
                f"map of {name}, so --balance auto cannot compare them"
            )
    shipped = task.shipped
    if job.ranks.lead:
        with whole(job.folder.path / member.file) as part:
            save_weights(shipped, part, weights_metadata(job, member, begun.licence))
    subject = Subject(
        name=name,
        weights=begun.weights,
        parameters=parameters(shipped),
        licence=begun.licence,
    )
    select = _answers(job, task, chosen, "select")
    if select is not None:
        subject = subject.model_copy(update=evaluate.selected(*select))
    score = subject.select_score
    measured = f": {score.told} of {score.n} select images" if score is not None else ""
    how = f"by {o.method}" if o.method != "none" else "without a teacher"
    return Done(
        f"{name}, {o.epochs} epochs {how}{measured}",
        [member.file],
        {
            "student": subject.model_dump(exclude_none=True),
            "balance": [one.model_dump() for one in balanced],
            **({} if store is None else {"store": _use(job, store).model_dump()}),
            **({} if o.rounds == 1 else {"rounds": _rounds(job, task, chosen, subject)}),
        },
    )


def _answers(
    job: Job, task: DistillationTask, chosen: Engine, role: Role
) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits of the weights that ship, in torch and fp32, and labels; None where the role is empty."""
    pixels, labels, _ = job.rendered(role, job.student)
    if not len(labels):
        return None
    exact = Engine(job.device, chosen.threads, "fp32")
    answers = evaluate.logits(task.shipped, task.trainee.normalise, pixels, exact).numpy()
    return answers, labels.numpy()


def _rounds(job: Job, task: DistillationTask, chosen: Engine, subject: Subject) -> list[dict[str, Any]]:
    """What is known of the rounds up to this one."""
    test = _answers(job, task, chosen, "test")
    mine = Round(
        round=job.place + 1,
        teacher=job.tutors[0].name if job.place == 0 else f"round {job.place}",
        seed=job.seed,
        select_accuracy=subject.select_score,
        accuracy=None if test is None else evaluate.score(*test),
        file=job.student.file,
    )
    return [*job.folder.facts().get("rounds", [])[: job.place], mine.model_dump(exclude_none=True)]


def _say_store(job: Job, store: Store) -> None:
    store.open(schedule_of(job).needed(0))
    use, images = _use(job, store), len(job.train.images)
    views = f"all {use.views} views" if use.complete else f"{use.views} fixed views"
    lost = "" if use.lost_mass is None else f", without {figures.significant(100 * use.lost_mass)} % of p_T"
    job.display.note(
        f"the teachers' answers to {views} of each image are stored in {job.cache.root}: "
        f"{use.bytes_per_view // images:,} bytes a view{lost}, {figures.megabytes(use.bytes_per_view)} a "
        f"view of all images, {figures.megabytes(use.views * use.bytes_per_view)} in all"
    )


def _use(job: Job, store: Store) -> StoreUse:
    schedule = schedule_of(job)
    assert job.options.epochs is not None
    return StoreUse(
        views=len(schedule.used(job.options.epochs)),
        complete=schedule.complete,
        bytes_per_view=store.bytes_per_view,
        lost_mass=store.lost_mass(),
        computed=store.computed,
    )


def _told(one: BalancedWeight) -> str:
    return (
        f"the weight of {one.method} was multiplied by {one.factor:.3g}: its gradients were {one.pull:.3g} "
        f"times those of the labels, where {one.least:g} to {one.most:g} is known to do good (--balance off "
        "leaves weights alone)"
    )


TEACHERS = "student's teachers"
"""Under which the run folder keeps the engine that the teachers answer with."""


def width_of(job: Job) -> int | None:
    """To which width a method has the student's vector brought while it learns; None: it stays as it is."""
    names = methods.names(job.options.method)
    if not names:
        return None
    parameters = methods.parameters(names, job.options.settings)
    student, teachers = job.shapes(job.student), [job.shapes(tutor) for tutor in job.tutors]
    asked = (methods.load(name).widens(parameters[name], student, teachers) for name in names)
    return next((width for width in asked if width is not None), None)


def methods_of(job: Job) -> dict[str, Method]:
    """The run's methods by name, made from what ``prepare`` has left."""
    o = job.options
    names = methods.names(o.method)
    parameters = methods.parameters(names, o.settings)
    classes = {name: methods.load(name) for name in names}
    width = width_of(job)
    student = job.shapes(job.student) if width is None else replace(job.shapes(job.student), vector=width)
    teachers = [job.shapes(tutor) for tutor in job.tutors] if names else []
    prepared = load_file(job.folder.path / job.prepared) if any(c.prepares for c in classes.values()) else {}
    made: dict[str, Method] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        for name in names:
            own = {
                key[len(name) + 1 :]: value for key, value in prepared.items() if key.startswith(f"{name}.")
            }
            made[name] = classes[name](parameters[name], student, teachers, own)
    return made


def _task(job: Job, network: torch.nn.Module, chosen: Engine) -> tuple[DistillationTask, Store | None]:
    """What is trained and, unless the teachers are asked at every step, the store of their answers."""
    o = job.options
    heads = methods_of(job)
    width = width_of(job)
    if width is not None:
        Readouts(network).check_widening()  # with numbers: the shapes alone were looked at before
        widen(network, width, job.seed)
    asked: list[Teacher] = []
    store = None
    if heads:
        answering = engine(job, TEACHERS, lambda asked: inference_engine(job.device, asked))
        if o.store_views:
            store = store_of(job, heads, answering)
        else:
            asked = [load_teacher(job, tutor, answering) for tutor in job.tutors]
    task = DistillationTask(
        network,
        job.geometry(job.student),
        chosen,
        label_smoothing=o.label_smoothing or 0.0,
        teachers=asked,
        teacher_reads=[
            _union(method.of_teachers[t][1] for method in heads.values()) for t in range(len(asked))
        ],
        methods=heads,
        student_reads=_union(method.of_student for method in heads.values()),
        weights=weights_of_losses(o.weight, {name: type(method) for name, method in heads.items()}),
        balance=o.balance == "auto",
        ema=o.ema,
        average_last=o.average_last,
        ranks=job.ranks,
    )
    return task, store


def _union(reads: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*reads)


def weights_of_losses(given: dict[str, float], classes: dict[str, type[Method]]) -> dict[str, float]:
    """Cross-entropy has the paper's weight where a method stands alone, and 1 in a sum."""
    alone = next(iter(classes.values())).cross_entropy if len(classes) == 1 else 1.0
    return {"ce": alone, **given}
