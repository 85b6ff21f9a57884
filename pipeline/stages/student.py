"""student: the small network learns from the teachers; what ships is a plain timm state_dict."""

import math
from typing import Any

import numpy as np

from ...models.checkpoint import save_weights
from ...models.initialize import parameters, start, student_source
from .. import methods
from ..data.dataset import Split
from ..evaluation.inference import compute_logits
from ..report import format
from ..runs.device import Engine, choose_engine, use_threads
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.results import BalancedWeight, Round, TeacherCacheUse, Subject
from ..tasks import task_of
from ..training.job import Job
from ..training.student import save_heads, student_task
from ..training.task import DistillationTask
from ..training.teacher_cache import Store, schedule_of
from ..training.trainer import engine, learn, plan
from ..training.weights import weights_metadata

HEADS = "student.heads.safetensors"
"""The methods' heads in the run folder, for quantization-aware training."""


def run(job: Job) -> StageResult:
    o, member = job.options, job.student
    name = member.name
    assert o.epochs and o.lr and o.warmup_epochs is not None
    with job.ranks.main_first():  # the others find downloaded weights
        begun = start(
            name,
            student_source(name, o.student_weights, job.display.note),
            "auto",
            job.data.classes,
            member.image_size,
            job.seed,
            job.display.note,
            role="student",
            activation=o.activation,
        )
    chosen = engine(job, job.training, lambda asked: choose_engine(job.device, asked, begun.network))
    use_threads(chosen.threads)
    task, store = student_task(job, begun.network, chosen)
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
            job.display.note(f"the weight of {method} is left as it is: {_not_compared(method, name)}")
    if store is not None and job.ranks.is_main:
        store.look_up(schedule_of(job).used(o.epochs))  # those too that an interrupted run has learned from
    shipped = task.shipped
    outputs = [member.file]
    if job.ranks.is_main and job.round is None and task.trainee.methods:
        with atomic_write(job.folder.path / HEADS) as part:
            save_heads(task, part)
        outputs.append(HEADS)
    if job.ranks.is_main:
        with atomic_write(job.folder.path / member.file) as part:
            save_weights(shipped, part, weights_metadata(job, member, begun.licence))
    subject = Subject(
        name=name,
        weights=begun.weights,
        parameters=parameters(shipped),
        licence=begun.licence,
    )
    val = _answers(job, task, chosen, "val")
    if val is not None:
        subject = subject.model_copy(update={"val_score": task_of(job.data).score(*val)})
    score = subject.val_score
    measured = f": {score.text} on {score.n} val images" if score is not None else ""
    how = f"by {o.method}" if o.method != "none" else "without a teacher"
    return StageResult(
        f"{name}, {o.epochs} epochs {how}{measured}",
        outputs,
        {
            "student": subject.model_dump(exclude_none=True),
            "balance": [one.model_dump() for one in balanced],
            **({} if store is None else {"teacher_cache": _use(job, store).model_dump()}),
            **({} if o.rounds == 1 else {"rounds": _rounds(job, task, chosen, subject)}),
        },
    )


def _answers(
    job: Job, task: DistillationTask, chosen: Engine, role: Split
) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits of the weights that ship, in torch and fp32, and labels; None where the role is empty."""
    pixels, labels, _ = job.rendered(role, job.student)
    if not len(labels):
        return None
    exact = Engine(job.device, chosen.threads, "fp32")
    answers = compute_logits(task.shipped, task.trainee.normalise, pixels, exact).numpy()
    return answers, labels.numpy()


def _rounds(job: Job, task: DistillationTask, chosen: Engine, subject: Subject) -> list[dict[str, Any]]:
    """What is known of the rounds up to this one."""
    test = _answers(job, task, chosen, "test")
    mine = Round(
        round=job.place + 1,
        teacher=job.current_teachers[0].name if job.place == 0 else f"round {job.place}",
        seed=job.seed,
        val_score=subject.val_score,
        score=None if test is None else task_of(job.data).score(*test),
        file=job.student.file,
    )
    return [*job.folder.facts().get("rounds", [])[: job.place], mine.model_dump(exclude_none=True)]


def _say_store(job: Job, store: Store) -> None:
    store.open(schedule_of(job).needed(0))
    use, images = _use(job, store), len(job.train.images)
    views = f"all {use.views} views" if use.complete else f"{use.views} fixed views"
    lost = "" if use.lost_mass is None else f", without {format.significant(100 * use.lost_mass)} % of p_T"
    job.display.note(
        f"the teachers' answers to {views} of each image are stored in {job.cache.root}: "
        f"{use.bytes_per_view // images:,} bytes a view{lost}, {format.megabytes(use.bytes_per_view)} a "
        f"view of all images, {format.megabytes(use.views * use.bytes_per_view)} in all"
    )


def _use(job: Job, store: Store) -> TeacherCacheUse:
    schedule = schedule_of(job)
    assert job.options.epochs is not None
    return TeacherCacheUse(
        views=len(schedule.used(job.options.epochs)),
        complete=schedule.complete,
        bytes_per_view=store.bytes_per_view,
        lost_mass=store.lost_mass(),
        computed=store.computed,
    )


def _not_compared(method: str, student: str) -> str:
    if methods.load(method).gradient_ratio[1] == math.inf:
        return "nothing is known of which weight does good"
    return (
        f"its gradients, or those of the labels, were not to be seen in the last map of {student}, so that "
        "--balance auto cannot compare them"
    )


def _told(one: BalancedWeight) -> str:
    return (
        f"the weight of {one.method} was multiplied by {one.factor:.3g}: its gradients were {one.pull:.3g} "
        f"times those of the labels, where {one.least:g} to {one.most:g} is known to do good (--balance off "
        "leaves weights alone)"
    )
