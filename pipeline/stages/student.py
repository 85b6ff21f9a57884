"""prepare, student and ``round K``: prepare the methods and train a student from the teachers."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...models.checkpoint import tensors_digest
from ...models.initialize import initialize, parameters, student_source
from ...models.weights import classifier_weight
from .. import methods
from ..data.dataset import Split
from ..data.training_data import TrainingData
from ..data.views import FIXED_SEED, ViewSchedule
from ..evaluation.predictions import batches
from ..methods.base import Features, PrepareContext
from ..report import format
from ..runs.artifacts import VAL_PREDICTIONS_FILE, write_predictions
from ..runs.device import choose_engine, inference_engine, use_threads
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.hashes import digest
from ..runs.results import BalancedWeight, Round, Subject, TeacherCacheUse
from ..training.context import RunContext
from ..training.student import HEADS, build_methods, method_setup, save_heads, student_task, view_schedule
from ..training.task import DistillationTask, Teacher
from ..training.teacher_cache import TeacherCache
from ..training.trainer import build_plan, choose_run_engine, compute_split_logits, run_training
from ..training.weights import load_network, load_teacher, write_weights


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    if context.round.ships:
        return train(context, data, previous)
    prepared = _prepare_round(context, data, previous) if context.ranks.is_main else []
    context.ranks.barrier()
    result = train(context, data, previous)
    # The report describes the student that ships; of the others only their row in the table of rounds.
    return StageResult(result.summary, [*prepared, *result.outputs], {"rounds": result.facts["rounds"]})


def _prepare_round(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> Sequence[str]:
    """Run ``prepare`` for this round, unless a resumed round has its files."""
    file = context.folder.path / context.round.prepared
    if file.exists():
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("key") == context.key:
                return [context.round.prepared]
    return prepare(context, data, previous).outputs


def train(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    """Train the student of the context's round, and write its weights."""
    o, round_, spec = context.options, context.round, context.student
    run, is_main = context.folder.path, context.ranks.is_main
    assert o.epochs and o.lr and o.warmup_epochs is not None
    with context.ranks.main_first():  # downloads weights
        initial = initialize(
            spec.name,
            student_source(spec.name, o.student_weights, context.display.note),
            "auto",
            data.classes,
            spec.image_size,
            round_.seed,
            context.display.note,
            role="student",
            activation=o.activation,
        )
    engine = choose_run_engine(
        context, round_.training, lambda precision: choose_engine(context.device, precision, initial.network)
    )
    use_threads(engine.threads)
    built = build_methods(o, round_, run)
    task, cache = student_task(context, data, initial.network, engine, built)
    plan = build_plan(
        context,
        data,
        epochs=o.epochs,
        lr=o.lr,
        warmup_epochs=o.warmup_epochs,
        seed=round_.seed,
        unlabeled_ratio=o.unlabeled_ratio or 0.0,
    )
    schedule = view_schedule(o, data.policy, round_.seed)
    labeled, images = len(data.train.labeled), len(data.train.images)
    # Unlabeled images show a view in each pass over them, of which there may be more than epochs.
    epochs = max(o.epochs, plan.passes(o.epochs - 1, labeled, images - labeled).stop)
    if cache is not None:
        cache.open(schedule.epoch_views(0))
        _note_cache(context, cache, _cache_use(cache, schedule, epochs))
    run_training(
        context, data, task, plan, training=round_.training, spec=spec, schedule=schedule, cache=cache
    )
    balanced = task.balanced_weights()
    if o.balance == "auto":
        _note_balance(context, task, balanced)
    if cache is not None and is_main:
        # For the report: including those of an interrupted run.
        cache.open_cached(schedule.all_views(epochs))
    outputs = [spec.file]
    shipped = task.shipped
    if is_main and round_.ships and built:
        with atomic_write(run / HEADS) as part:
            save_heads(task, part)
        outputs.append(HEADS)
    if is_main:
        write_weights(run, spec, shipped, data.classes, context.key, initial.license)
    subject = Subject(
        name=spec.name, weights=initial.weights, parameters=parameters(shipped), license=initial.license
    )
    val = compute_split_logits(context, data, spec, shipped, "val")
    if val is not None:
        subject = subject.model_copy(update={"val_score": context.task.score(*val)})
        if is_main and round_.ships and data.dataset.task == "classification":
            keys = data.rendered("val", spec)[2].keys.numpy()
            write_predictions(run / VAL_PREDICTIONS_FILE, keys, val[1], {"student": val[0]})
            outputs.append(VAL_PREDICTIONS_FILE)
    facts: dict[str, Any] = {
        "student": subject.model_dump(exclude_none=True),
        "balance": [weight.model_dump() for weight in balanced],
    }
    if cache is not None:
        facts["teacher_cache"] = _cache_use(cache, schedule, epochs).model_dump()
    if o.rounds > 1:
        row = _describe_round(context, data, shipped, subject)
        facts["rounds"] = [*previous.get("rounds", [])[: round_.index], row.model_dump(exclude_none=True)]
    score = subject.val_score
    how = f"by {o.method}" if o.method != "none" else "without a teacher"
    accuracy = f": {score.text} on {score.n} val images" if score is not None else ""
    summary = f"{spec.name}, {format.plural(o.epochs, 'epoch')} {how}{accuracy}"
    return StageResult(summary, outputs, facts)


def _describe_round(context: RunContext, data: TrainingData, network: nn.Module, subject: Subject) -> Round:
    round_ = context.round
    test = compute_split_logits(context, data, context.student, network, "test")
    return Round(
        round=round_.index + 1,
        teacher=f"round {round_.index}" if round_.index else round_.teachers[0].name,
        seed=round_.seed,
        val_score=subject.val_score,
        score=None if test is None else context.task.score(*test),
        file=context.student.file,
    )


def _cache_use(cache: TeacherCache, schedule: ViewSchedule, epochs: int) -> TeacherCacheUse:
    return TeacherCacheUse(
        views=len(schedule.all_views(epochs)),
        complete=schedule.covers_all,
        bytes_per_view=cache.bytes_per_view,
        lost_mass=cache.lost_mass(),
        computed=cache.computed,
    )


def _note_cache(context: RunContext, cache: TeacherCache, use: TeacherCacheUse) -> None:
    views = f"all {use.views} views" if use.complete else format.plural(use.views, "fixed view")
    lost = "" if use.lost_mass is None else f", without {format.significant(100 * use.lost_mass)} % of p_T"
    context.display.note(
        f"teacher outputs for {views} of each image are cached in {context.cache.root}: "
        f"{use.bytes_per_view // cache.images:,} bytes per image and view{lost}, "
        f"{format.megabytes(use.views * use.bytes_per_view)} in total"
    )


def _note_balance(context: RunContext, task: DistillationTask, balanced: Sequence[BalancedWeight]) -> None:
    for weight in balanced:
        if weight.factor != 1:
            context.display.note(
                f"the weight of {weight.method} was multiplied by {weight.factor:.3g}: the ratio of its "
                f"gradients to those of the labels was {weight.ratio:.3g}, and the method is known to work "
                f"from {weight.low:g} to {weight.high:g} (--balance off keeps the weight)"
            )
    measured = {weight.method for weight in balanced}
    for name in task.student.methods:
        if name not in measured:
            last_map = f"the last map of {context.student.name}"
            reason = f"its gradients, or those of the labels, are zero or negligible at {last_map}"
            if methods.load(name).gradient_ratio[1] == math.inf:
                reason = "no range of gradient ratios is known for it"
            context.display.note(f"--balance auto keeps the weight of {name}: {reason}")


def prepare(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    o = context.options
    names = methods.parse_methods(o.method)
    parameters = methods.parse_parameters(names, o.settings)
    classes = {name: method for name in names if (method := methods.load(name)).prepares}
    if not classes:
        return StageResult("nothing to prepare" if names else "no method, nothing to prepare")
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    summaries = []
    with tempfile.TemporaryDirectory(prefix=".prepare.", suffix=".part", dir=context.folder.path) as scratch:
        prepare_context = _prepare_context(context, data, Path(scratch))
        for name, method in classes.items():
            result = method.prepare(parameters[name], prepare_context)
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in result.tensors.items()}
            facts |= result.facts
            summaries.append(result.summary)
    file = context.round.prepared
    with atomic_write(context.folder.path / file) as part:
        save_file(tensors, part, {"key": context.key})
    return StageResult("; ".join(summaries), [file], facts)


def _prepare_context(context: RunContext, data: TrainingData, scratch: Path) -> PrepareContext:
    engine = inference_engine(context.device, "fp32")
    use_threads(engine.threads)
    run, specs = context.folder.path, context.round.teachers
    images = len(data.train.images)

    @lru_cache(maxsize=1)
    def teacher(t: int) -> Teacher:
        return load_teacher(run, specs[t], engine)

    def features(t: int, reads: frozenset[str]) -> Iterator[Features]:
        for first, batch in data.rendered_train(specs[t]):
            yield teacher(t)(batch, reads)
            context.progress.update(
                f"teacher {specs[t].name}: computing features", first + len(batch), images, "images"
            )

    def sample(t: int, reads: frozenset[str], limit: int) -> Iterator[tuple[np.ndarray, Features]]:
        split: Split = "val" if data.dataset.val else "train"
        pixels, _, _ = data.rendered(split, specs[t], limit)
        for first, batch in batches(pixels, context.device):
            yield pixels[first : first + len(batch)].numpy(), teacher(t)(batch, reads)

    def cached(t: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        sources = {"teacher": tensors_digest(run / specs[t].file), "data": data.dataset.fingerprint}
        if unlabeled := data.dataset.unlabeled_fingerprint:
            sources["unlabeled"] = unlabeled
        full_key = digest({**key, **sources, "geometry": specs[t].preprocessing.to_dict()})
        return context.cache.get(kind, full_key) or context.cache.put(kind, full_key, write)

    setup = method_setup(context.round)
    return PrepareContext(
        student=setup.student,
        teachers=setup.teachers,
        teacher_names=[spec.name for spec in specs],
        images=images,
        features=features,
        classifier=lambda t: classifier_weight(load_network(run, specs[t])),
        cached=cached,
        scratch=scratch,
        # Not the run's seed: cached teacher outputs depend on the vocabulary, and all runs share them.
        seed=FIXED_SEED,
        note=context.display.note,
        sample=sample,
        weights=lambda t: load_network(run, specs[t]).state_dict(),
    )
