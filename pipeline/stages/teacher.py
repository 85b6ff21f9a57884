"""teacher: check, tune or train the teachers, and measure their accuracy."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from timm.utils.misc import natural_key
from torch import nn

from ...export.runtime import height_width
from ...models.build import default_image_size
from ...models.checkpoint import read_checkpoint
from ...models.initialize import InitialNetwork, initialize, parameters
from ...models.weights import load_into, permute_head
from ..config.network import NetworkSpec
from ..data.dataset import SPLITS
from ..data.decode import sample_sizes, shown_fractions
from ..data.training_data import TrainingData
from ..errors import JobError
from ..report.format import join_names, plural
from ..runs import artifacts
from ..runs.device import choose_engine, threads, use_threads
from ..runs.files import atomic_write, link_or_copy
from ..runs.folder import StageResult, get_training
from ..runs.hashes import digest
from ..runs.results import DataSummary, Epoch, Subject
from ..runs.scores import Proportion, Score
from ..tasks.base import Task
from ..training.context import RunContext
from ..training.task import DistillationTask
from ..training.trackers import EpochLog
from ..training.trainer import (
    LogitsAndLabels,
    build_plan,
    choose_run_engine,
    compute_split_logits,
    run_training,
)
from ..training.weights import write_weights

LOGITS = "teacher.logits.safetensors"
"""fp32 logits on test of each teacher with a head, to compare the student with."""

TRAINED, WEIGHTS, EPOCHS = "teachers", "teacher.safetensors", "metrics.jsonl"
"""Cache entries of trained teachers, and their files."""

MAX_LEAKS = 1000
"""Groups of near copies that are recorded."""

MAX_CHECK_IMAGES = 10_000
"""Training images on which a kept head is checked if there are no val images."""

MAX_HIDDEN = 0.1
"""Fraction of images that may be shown less than half."""

MAX_LATE_GAIN = 5.0
"""Percentage points that a training that has converged does not gain in the last quarter of its epochs."""

SMALL = 0.75
"""Fraction of the side that weights were trained at, below which selected rows of a head are tuned."""

MIN_IMAGES_PER_CLASS, MAX_MATCHED_CLASSES = 5, 2000
"""Fewer images match classes in some order by chance; the time to match grows with the classes cubed."""


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    with context.ranks.main_first():  # fills the image cache
        summary = _summarize_data(context, data)
    # All are loaded before one is trained, so that errors come early.
    initial = [_load(context, data, t) for t in range(len(context.teachers))]
    _check_seeds(context, initial[0])
    subjects, outputs, logits = [], [LOGITS, artifacts.TRAIN_IMAGES_FILE], {}
    for t, spec in enumerate(context.teachers):
        subject, test = _make_teacher(context, data, t, initial.pop(0))
        if test is not None:
            logits[str(t)] = test
        subjects.append(subject)
        outputs.append(spec.file)
    if context.ranks.is_main:
        with atomic_write(context.folder.path / LOGITS) as part:
            save_file(logits, part)
        artifacts.write_train_images(context.folder.path, data.train.keys.numpy())
    ensemble = _describe_ensemble(context, data, subjects, list(logits.values()))
    facts: dict[str, Any] = {
        "data": summary.model_dump(exclude_none=True),
        "teachers": [subject.model_dump(exclude_none=True) for subject in subjects],
        "teacher": ensemble.model_dump(exclude_none=True),
    }
    return StageResult("; ".join(_summarize(subject) for subject in subjects), outputs, facts)


def _load(context: RunContext, data: TrainingData, t: int) -> InitialNetwork:
    o, spec = context.options, context.teachers[t]
    with context.ranks.main_first():  # downloads weights
        return initialize(
            spec.name,
            o.teacher_weights[t],
            o.teacher_head[t],
            data.classes,
            spec.image_size,
            o.seed + t,
            context.display.note,
        )


def _check_seeds(context: RunContext, initial: InitialNetwork) -> None:
    """Raise JobError if teachers from several seeds would be the same network."""
    count = context.options.teachers_from_seeds
    if count > 1 and initial.head != "replaced":
        why = "fits the data and is kept" if initial.head == "kept" else "is left out"
        raise JobError(
            f"--teachers-from-seeds {count}: the head of {context.teachers[0].name} {why}, so all {count} "
            "teachers would be the same network. Use --teacher-head replace, or --teachers-from-seeds 1."
        )


def _make_teacher(
    context: RunContext, data: TrainingData, t: int, initial: InitialNetwork
) -> tuple[Subject, np.ndarray | None]:
    """Train a teacher if needed, write its weights and return its facts and its logits on test, if any."""
    spec = context.teachers[t]
    network = initial.network.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_threads(threads())
    val = test = None
    head: str = initial.head
    if head == "replaced" or _tunes_selected_rows(context, t, initial):
        head = "tuned" if head == "kept" else head
        network = _load_or_train(context, data, t, initial)
    elif "teacher_epochs" in context.set_options:
        fits = "no head" if head == "none" else "a head that fits the data"
        context.display.note(f"--teacher-epochs has no effect: {spec.name} has {fits} and is used as it is")
    weights = initial.weights
    if initial.head != "none":
        val = compute_split_logits(context, data, spec, network, "val")
        if head == "kept":
            order = _check_kept_head(context, data, spec, network, val, certain=initial.names_classes)
            if order is not None:
                name, rows = order
                weights += f", classes reordered from {name}"
                permute_head(network, rows)
                val = None if val is None else (context.task.reorder(val[0], rows), val[1])
        test = compute_split_logits(context, data, spec, network, "test")
    if context.ranks.is_main and head in ("kept", "none"):  # others were written when they were trained
        write_weights(context.folder.path, spec, network, data.classes, context.key, initial.license)
    subject = Subject(
        name=spec.name,
        weights=weights,
        head=head,
        license=initial.license,
        parameters=parameters(network),
        **({} if test is None else _scores(context.task, test, val, data.classes)),
    )
    return subject, None if test is None else test[0]


def _tunes_selected_rows(context: RunContext, t: int, initial: InitialNetwork) -> bool:
    """Return True if the rows that were selected of a larger head are tuned, with all weights, to the images.

    So they are if these are much smaller than those that the weights were trained on: at a quarter of the
    side, an EfficientNet-Lite2 loses a third of its accuracy on ten of its classes.
    """
    spec = context.teachers[t]
    side, usual = min(height_width(spec.image_size)), default_image_size(spec.name)
    if not initial.selected or context.options.teacher_head[t] == "keep" or side >= SMALL * usual:
        return False
    context.display.note(
        f"{spec.name} is tuned from these rows, since the images have {side} px and its weights were trained "
        f"at {usual} (--teacher-head keep uses it as it is)"
    )
    return True


def _load_or_train(context: RunContext, data: TrainingData, t: int, initial: InitialNetwork) -> nn.Module:
    """Return the trained teacher: from the cache if a run with equal weights, data and options left it.

    Its device, threads and number of processes may have been others, as those of a resumed training may be.
    """
    training = f"teacher {t}" if len(context.teachers) > 1 else "teacher"
    spec, o = context.teachers[t], context.options
    published = initial.weights if o.teacher_weights[t] == "auto" else None  # timm may choose others later
    key = digest({"key": context.key, "teacher": t, "precision": o.precision, "published": published})
    entry = context.cache.get(TRAINED, key)
    is_cached = not context.ranks.max([entry is None])[0]
    if entry is not None and is_cached:
        network = initial.network
        load_into(network, read_checkpoint(entry / WEIGHTS))
        context.display.note(
            f"{spec.name}: trained by an earlier run with the same weights, data and options, and taken from "
            "the cache"
        )
        with closing(EpochLog(context, training)) as log:
            for line in (entry / EPOCHS).read_text(encoding="utf-8").splitlines():
                log(Epoch.model_validate_json(line))
    else:
        network = _train(context, data, t, initial, training)
    if not context.ranks.is_main:
        return network
    curve = [line for line in context.folder.curves() if get_training(line) == training]
    _check_finished_learning(context, spec, [Epoch.model_validate_json(line) for line in curve])
    file = write_weights(context.folder.path, spec, network, data.classes, context.key, initial.license)

    def write(folder: Path) -> None:
        link_or_copy(file, folder / WEIGHTS)
        (folder / EPOCHS).write_text("\n".join(curve), encoding="utf-8")

    if not is_cached:
        context.cache.put(TRAINED, key, write)
    return network


def _train(
    context: RunContext, data: TrainingData, t: int, initial: InitialNetwork, training: str
) -> nn.Module:
    o, spec = context.options, context.teachers[t]
    assert o.teacher_epochs and o.teacher_lr and o.teacher_warmup_epochs is not None
    engine = choose_run_engine(
        context, training, lambda precision: choose_engine(context.device, precision, initial.network)
    )
    task = DistillationTask(
        initial.network,
        spec.geometry,
        engine,
        label_task=context.task,
        label_smoothing=o.label_smoothing or 0.0,
    )
    plan = build_plan(
        context,
        data,
        epochs=o.teacher_epochs,
        lr=o.teacher_lr,
        warmup_epochs=o.teacher_warmup_epochs,
        seed=o.seed + t,
    )
    run_training(context, data, task, plan, training=training, spec=spec)
    return task.network


def _check_finished_learning(context: RunContext, spec: NetworkSpec, epochs: Sequence[Epoch]) -> None:
    """Warn if the accuracy on training views rose by several points in the last quarter of the epochs."""
    count = len(epochs)
    late = [e.train_accuracy for e in epochs[-1 - count // 4 :] if e.train_accuracy is not None]
    if late and late[-1] - late[0] > MAX_LATE_GAIN:
        context.display.warn(
            f"{spec.name} was still learning when its {count} epochs ended: {late[0]:.1f} → {late[-1]:.1f} % "
            f"of the training views in the last quarter. Try --teacher-epochs {2 * count}, or a higher "
            "--teacher-lr"
        )


def _scores(
    task: Task, test: LogitsAndLabels, val: LogitsAndLabels | None, classes: Sequence[str]
) -> dict[str, Any]:
    """Return scores as fields of ``Subject``."""
    if val is None:
        return {"score": task.score(*test, classes)}
    return {"score": task.score(*test, classes, task.choose_thresholds(*val)), "val_score": task.score(*val)}


CLASS_ORDERS: Mapping[str, Callable[[str], Any]] = {
    "timm's order": natural_key,
    "the order of torchvision": str,
    "the order without case": str.casefold,
}
"""Orders in which programs number class folders, as sort keys."""


def _check_kept_head(
    context: RunContext,
    data: TrainingData,
    spec: NetworkSpec,
    network: nn.Module,
    val: LogitsAndLabels | None,
    *,
    certain: bool,
) -> tuple[str, list[int]] | None:
    """Check on val (or train) images that a kept head is better than chance, and the order of its classes.

    Args:
        certain: the weights name these classes, so a poor head is only a warning.

    Returns:
        The name of another order of the head's classes and the row of each of the data's classes, if it is
        clearly better than the data's order.

    Raises:
        JobError: the head may belong to another dataset.
    """
    task, split = context.task, "train" if val is None else "val"
    if val is None:
        val = compute_split_logits(context, data, spec, network, "train", MAX_CHECK_IMAGES)
    assert val is not None
    logits, labels = val
    score, chance = task.score(logits, labels), task.chance(labels)
    near_chance = task.is_near_chance(score, labels)
    for name, sort_key in ({} if certain else CLASS_ORDERS).items():
        ordered = sorted(data.classes, key=sort_key)
        rows = [ordered.index(label) for label in data.classes]
        if ordered == list(data.classes):
            continue
        reordered = task.score(task.reorder(logits, rows), labels)
        if reordered.low > score.high or (near_chance and not task.is_near_chance(reordered, labels)):
            context.display.warn(
                f"the head of {spec.name} numbers the classes in {name}: {reordered.text} on {score.n} "
                f"{split} images, {score.text} in the order of the data. It is reordered"
            )
            return name, rows
    hint = "" if certain else _describe_permutation(task, logits, labels, score)
    if not near_chance:
        if hint:
            context.display.warn(f"{spec.name}: {score.text} on {score.n} {split} images. {hint}")
        return None
    problem = (
        f"The teacher {spec.name} has {score.text} on {score.n} {split} images, near chance "
        f"({chance.percent:.1f} %, {chance.meaning})."
    )
    if certain:
        context.display.warn(f"{problem} It may be too weak to teach.")
        return None
    raise JobError(
        f"{problem} {hint or 'Its head may be trained for other classes, or for another order of them.'} Use "
        "--teacher-head replace to tune it on the data, or weights trained for these classes."
    )


def _describe_permutation(task: Task, logits: np.ndarray, labels: np.ndarray, score: Score) -> str:
    """Describe a head whose classes are those of the data in an unknown order; empty if it is not one."""
    classes = logits.shape[1]
    if classes > MAX_MATCHED_CLASSES or len(labels) < MIN_IMAGES_PER_CLASS * classes:
        return ""
    confusion = task.confusion(logits, labels)
    if confusion is None:
        return ""
    counts = np.zeros((classes, classes), dtype=int)
    for label, predicted, n in confusion:
        counts[label, predicted] = n
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matched = Proportion.from_counts(int(counts[rows, columns].sum()), len(labels))
    if matched.low <= score.high:
        return ""
    return (
        f"With its classes in another order it would have {matched.percent:.1f} %, so the weights seem to "
        "number the classes differently. Add their names to the file (label_names) to have them reordered."
    )


def _describe_ensemble(
    context: RunContext, data: TrainingData, subjects: list[Subject], logits: list[np.ndarray]
) -> Subject:
    """Describe the single teacher, or the mean of the probabilities of the teachers with a head."""
    if len(subjects) == 1:
        return subjects[0]
    ensemble = Subject(
        name=join_names([subject.name for subject in subjects]),
        weights="ensemble",
        parameters=sum(subject.parameters or 0 for subject in subjects),
    )
    if not logits:
        return ensemble
    labels = data.rendered("test", context.teachers[0])[1].numpy()
    thresholds = [t for subject in subjects if (t := subject.thresholds) is not None]
    score = context.task.score(
        context.task.ensemble(logits),
        labels,
        data.classes,
        np.mean(thresholds, axis=0) if thresholds else None,
    )
    return ensemble.model_copy(update={"score": score})


def _summarize_data(context: RunContext, data: TrainingData) -> DataSummary:
    readable = data.readable(context.student)
    for spec in context.teachers:
        for split in SPLITS[1:]:
            data.rendered(split, spec)
    if readable.duplicates:
        context.display.warn(
            f"the data contains {plural(len(readable.duplicates), 'image')} more than once, in several "
            "folders or classes or in test, where each counts once; the report lists them"
        )
    leaked = sum(leak.in_test for leak in readable.leaks)
    if readable.leaks:
        images = f"{leaked} of {len(readable.test)} test images have" if leaked else "Some val images have"
        context.display.warn(
            f"{images} a near copy in {'train or val' if leaked else 'train'}, in another format, size or "
            f"quality, so the {'test' if leaked else 'val'} results are too good. The report lists them. "
            "Remove the copies, or provide one folder per class without splits: then they stay together"
        )
    sizes = sample_sizes(readable.train)
    shown = shown_fractions(sizes, context.student.preprocessing)
    if shown:
        _check_crops(context, sizes, shown)
    if readable.skipped:
        skipped = plural(len(readable.skipped), "file was", "files were")
        context.display.warn(f"{skipped} skipped; the report has the list")
    classes = readable.classes
    return DataSummary(
        name=readable.name,
        classes=list(classes),
        train=len(readable.train),
        val=len(readable.val),
        test=len(readable.test),
        unlabeled=len(readable.unlabeled),
        left_out=dict(readable.left_out),
        per_class={split: dict(zip(classes, readable.counts[split], strict=True)) for split in SPLITS},
        skipped=[(file.name, file.reason) for file in readable.skipped],
        ignored=dict(readable.ignored),
        notes=list(readable.notes),
        duplicates=[list(group.names) for group in readable.duplicates],
        near_copies=[list(leak.names) for leak in readable.leaks[:MAX_LEAKS]],
        near_copies_in_test=leaked,
        fingerprint=data.dataset.fingerprint,  # of the whole dataset, as in the stages' keys
        task=readable.task,
        shown=100 * statistics.median(shown) if shown else None,
    )


def _check_crops(context: RunContext, sizes: Sequence[tuple[int, int]], shown: Sequence[float]) -> None:
    """Warn if many images, of (height, width), are shown less than half."""
    hidden = sum(fraction < 0.5 for fraction in shown) / len(shown)
    if hidden < MAX_HIDDEN:
        return
    height, width = height_width(context.teachers[0].image_size)
    side, step = (height * width) ** 0.5, 32 if min(height, width) >= 64 else 4
    root = statistics.median(tall / wide for tall, wide in sizes) ** 0.5
    tall, wide = (max(1, round(length / step)) * step for length in (side * root, side / root))
    context.display.warn(
        f"The center crop hides more than half of the picture in {hidden:.0%} of the images, and "
        f"{1 - statistics.median(shown):.0%} of the median picture. Use --resize squash or pad, or "
        f"--image-size HEIGHT,WIDTH ({tall},{wide} has the median aspect ratio)"
    )


def _summarize(subject: Subject) -> str:
    if subject.score is None:
        return f"{subject.name} (as it is): features only, no accuracy"
    trained = "trained from scratch" if subject.weights == "scratch" else "tuned"
    how = "as it is" if subject.head == "kept" else trained
    return f"{subject.name} ({how}): {subject.score.text} on {subject.score.n} test images"
