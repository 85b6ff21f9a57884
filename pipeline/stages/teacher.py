"""teacher: a network that knows the data, tuned or trained on it where it doesn't yet, and its accuracy."""

from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from ...export.runtime import allowed_cores
from ...models.checkpoint import save_weights
from ...models.initialize import Start, parameters, start
from ..data.dataset import SPLITS, Split
from ..data.render import Normalize
from ..errors import JobError
from ..evaluation.inference import compute_logits
from ..report.format import together
from ..runs import predictions
from ..runs.device import Engine, choose_engine, use_threads
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.results import DataSummary, Subject
from ..tasks import task_of, thresholds_of
from ..training.job import Job, NetworkSpec
from ..training.task import DistillationTask
from ..training.trainer import engine, learn, plan
from ..training.weights import weights_metadata

ANSWERS = "teacher_answers.safetensors"
"""The logits on the test role of each teacher that has a head, fp32: what the student is compared with."""

MEASURED = 10_000
"""Training images that this is found out on where nothing is held out: enough, and soon read."""


def run(job: Job) -> StageResult:
    with job.ranks.main_first():  # the others find the images in the cache
        data = _data(job)
    # Whatever is wrong with one of them is found before another is trained.
    begun = [_start(job, t) for t in range(len(job.teachers))]
    _refuse_copies(job, begun[0])
    subjects, outputs, answers = [], [ANSWERS, predictions.TRAIN_IMAGES_FILE], {}
    for t in range(len(begun)):
        subject, test = _teacher(job, t, begun.pop(0))
        if test is not None:
            answers[str(t)] = test
        subjects.append(subject)
        outputs.append(job.teachers[t].file)
    if job.ranks.is_main:
        with atomic_write(job.folder.path / ANSWERS) as part:
            save_file(answers, part)
        predictions.write_train_images(job.folder.path, job.train.keys.numpy())
    teacher = _together(job, subjects, list(answers.values()))
    facts: dict[str, Any] = {
        "data": data.model_dump(exclude_none=True),
        "teachers": [subject.model_dump(exclude_none=True) for subject in subjects],
        "teacher": teacher.model_dump(exclude_none=True),
    }
    return StageResult("; ".join(_line(subject) for subject in subjects), outputs, facts)


def _start(job: Job, t: int) -> Start:
    o, member = job.options, job.teachers[t]
    with job.ranks.main_first():  # the others find downloaded weights
        return start(
            member.name,
            o.teacher_weights[t],
            o.teacher_head[t],
            job.data.classes,
            member.image_size,
            o.seed + t,
            job.display.note,
        )


def _refuse_copies(job: Job, begun: Start) -> None:
    """
    Raises:
        JobError: several teachers were to be trained from seeds, and none is trained.
    """
    count = job.options.teachers_from_seeds
    if count > 1 and begun.head != "replaced":
        why = "fits the data and is kept" if begun.head == "kept" else "is left out"
        raise JobError(
            f"--teachers-from-seeds {count}: the head of {job.teachers[0].name} {why}, so that all {count} "
            "would be the same network; say --teacher-head replace, or --teachers-from-seeds 1."
        )


def _teacher(job: Job, t: int, begun: Start) -> tuple[Subject, np.ndarray | None]:
    """A teacher's weights written, what is known of it, and its logits on test, where it has any."""
    member = job.teachers[t]
    name = member.name
    network = begun.network.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = Engine(job.device, allowed_cores(), "fp32")
    use_threads(exact.threads)
    if begun.head == "none":
        return _headless(job, member, begun), None
    if begun.head == "kept":
        val = _measure(job, member, network, exact, "val")
        _above_chance(job, member, network, exact, val, certain=begun.names_classes)
        if "teacher_epochs" in job.given:
            job.display.note(
                f"the head of {name} fits and is used as it is: --teacher-epochs has nothing to do"
            )
    else:
        network = _train(job, t, begun)
        val = _measure(job, member, network, exact, "val")
    test = _measure(job, member, network, exact, "test")
    assert test is not None
    _save(job, member, network, begun)
    subject = Subject(
        name=name,
        weights=begun.weights,
        head=begun.head,
        licence=begun.licence,
        parameters=parameters(network),
        **_scores(job, member, test, val),
    )
    return subject, test


def _headless(job: Job, member: NetworkSpec, begun: Start) -> Subject:
    """A teacher whose features alone teach: there is no class to tune it on, nor an accuracy to measure."""
    if "teacher_epochs" in job.given:
        job.display.note(
            f"{member.name} has no head and is used as it is: --teacher-epochs has nothing to do"
        )
    _save(job, member, begun.network, begun)
    return Subject(
        name=member.name,
        weights=begun.weights,
        head=begun.head,
        licence=begun.licence,
        parameters=parameters(begun.network),
    )


def _save(job: Job, member: NetworkSpec, network: nn.Module, begun: Start) -> None:
    if job.ranks.is_main:
        with atomic_write(job.folder.path / member.file) as part:
            save_weights(network, part, weights_metadata(job, member, begun.licence))


def _train(job: Job, t: int, begun: Start) -> nn.Module:
    o, member = job.options, job.teachers[t]
    assert o.teacher_epochs and o.teacher_lr and o.teacher_warmup_epochs is not None
    what = f"teacher {t}" if len(job.teachers) > 1 else "teacher"
    task = DistillationTask(
        begun.network,
        job.geometry(member),
        engine(job, what, lambda asked: choose_engine(job.device, asked, begun.network)),
        label_task=task_of(job.data),
        label_smoothing=o.label_smoothing or 0.0,
    )
    learn(
        job,
        task,
        plan(
            job,
            epochs=o.teacher_epochs,
            lr=o.teacher_lr,
            warmup_epochs=o.teacher_warmup_epochs,
            seed=o.seed + t,
        ),
        what=what,
        member=member,
    )
    return task.network


def _measure(
    job: Job, member: NetworkSpec, network: nn.Module, exact: Engine, role: Split, most: int | None = None
) -> np.ndarray | None:
    """fp32 logits on a role [n,classes], or on ``most`` of its images; None where it is empty."""
    pixels, labels, _ = job.rendered(role, member, most)
    if not len(labels):
        return None
    geometry = job.geometry(member)
    normalise = Normalize(geometry.mean, geometry.std).to(job.device)
    mine = compute_logits(
        network,
        normalise,
        pixels[job.ranks.mine(len(pixels))],
        exact,
        lambda done, total: job.stage.update(f"measuring {member.name} on {role}", done, total, "images"),
    )
    return job.ranks.gather(mine).numpy()


def _scores(job: Job, member: NetworkSpec, test: np.ndarray, val: np.ndarray | None) -> dict[str, Any]:
    """What its answers to the test and the val images tell of a teacher, as fields of ``Subject``."""
    labels, selecting = (job.rendered(role, member)[1].numpy() for role in ("test", "val"))
    task = task_of(job.data)
    if val is None:
        return {"score": task.score(test, labels, job.data.classes)}
    thresholds = task.choose_thresholds(val, selecting)
    return {
        "score": task.score(test, labels, job.data.classes, thresholds),
        "val_score": task.score(val, selecting),
    }


def _above_chance(
    job: Job, member: NetworkSpec, network: nn.Module, exact: Engine, val: np.ndarray | None, *, certain: bool
) -> None:
    """A head that fits by its size may still be another task's: measured first, on val (or on test images'
    like, training ones, where nothing is held out).

    Args:
        certain: whether the weights name the classes of their head: then it can only be a weak one, which
            is told.

    Raises:
        JobError: it is no better than chance.
    """
    role: Split = "val" if val is not None else "train"
    most = None if val is not None else MEASURED
    logits = val if val is not None else _measure(job, member, network, exact, "train", most)
    assert logits is not None
    labels = job.rendered(role, member, most)[1].numpy()
    task = task_of(job.data)
    score, chance = task.score(logits, labels), task.chance(labels)
    if not task.is_near_chance(score, labels):
        return
    told = f"The teacher {member.name} has {score.text} on {score.n} {role} images, near chance "
    told += f"({chance.percent:.1f} %, {chance.meaning})"
    if not certain:
        raise JobError(
            f"{told}: its head has the right number of classes but not these ones or not in this order, or "
            f"it has not learned enough. {_OTHER_HEAD}"
        )
    job.display.warn(f"{told}: it knows these classes, but has not learned enough to teach them.")


_OTHER_HEAD = "Say --teacher-head replace to tune it on the data, or name weights trained for these classes."


def _together(job: Job, subjects: list[Subject], answers: list[np.ndarray]) -> Subject:
    """The one teacher, or the ensemble: the mean of the probabilities of those teachers that give any."""
    if len(subjects) == 1:
        return subjects[0]
    found = Subject(
        name=together([subject.name for subject in subjects]),
        weights="ensemble",
        parameters=sum(subject.parameters or 0 for subject in subjects),
    )
    if not answers:
        return found
    labels = job.rendered("test", job.teachers[0])[1].numpy()
    task = task_of(job.data)
    thresholds = [one for subject in subjects if (one := thresholds_of(subject)) is not None]
    score = task.score(
        task.likelihood.ensemble(answers),
        labels,
        job.data.classes,
        np.mean(thresholds, axis=0) if thresholds else None,
    )
    return found.model_copy(update={"score": score})


def _data(job: Job) -> DataSummary:
    data = job.readable()
    for member in job.teachers:
        for role in ("val", "test"):
            job.rendered(role, member)
    if data.duplicates:
        job.display.warn(
            f"{len(data.duplicates)} of the images stand in the data more than once, across folders or "
            "classes; the report lists them"
        )
    if data.skipped:
        job.display.warn(f"{len(data.skipped)} files were left out; the report lists them")
    return DataSummary(
        name=data.name,
        classes=list(data.classes),
        train=len(data.train),
        val=len(data.val),
        test=len(data.test),
        per_class={role: dict(zip(data.classes, data.counts[role], strict=True)) for role in SPLITS},
        skipped=[(one.name, one.reason) for one in data.skipped],
        duplicates=[list(group.names) for group in data.duplicates],
        fingerprint=job.data.fingerprint,  # of all that was given: what a run goes on with
        task=data.task,
    )


def _line(subject: Subject) -> str:
    if subject.score is None:
        return f"{subject.name} (as it is): features alone, no accuracy"
    how = (
        "as it is"
        if subject.head == "kept"
        else "trained here"
        if subject.weights == "scratch"
        else "tuned here"
    )
    return f"{subject.name} ({how}): {subject.score.text} on {subject.score.n} test images"
