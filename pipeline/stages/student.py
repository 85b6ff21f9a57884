"""student: train the student from the teachers. With ``--rounds``, each stage ``round K`` trains one more."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn

from ...models.checkpoint import save_weights
from ...models.initialize import initialize, parameters, student_source
from .. import methods
from ..data.training_data import TrainingData
from ..data.views import ViewSchedule
from ..report import format
from ..runs.device import choose_engine, use_threads
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.results import BalancedWeight, Round, Subject, TeacherCacheUse
from ..training.context import RunContext
from ..training.student import HEADS, build_methods, save_heads, student_task, view_schedule
from ..training.task import DistillationTask
from ..training.teacher_cache import TeacherCache
from ..training.trainer import build_plan, choose_run_engine, compute_split_logits, run_training
from ..training.weights import weights_metadata
from . import prepare


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    if context.round.ships:
        return _train(context, data, previous)
    prepared = _prepare_round(context, data, previous) if context.ranks.is_main else []
    context.ranks.barrier()
    result = _train(context, data, previous)
    # The report describes the student that ships; of the others only their row in the table of rounds.
    return StageResult(result.summary, [*prepared, *result.outputs], {"rounds": result.facts["rounds"]})


def _prepare_round(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> Sequence[str]:
    """Run ``prepare`` for this round, unless a resumed round has its files."""
    file = context.folder.path / context.round.prepared
    if file.exists():
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("key") == context.key:
                return [context.round.prepared]
    return prepare.run(context, data, previous).outputs


def _train(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
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
        context, data, epochs=o.epochs, lr=o.lr, warmup_epochs=o.warmup_epochs, seed=round_.seed
    )
    schedule = view_schedule(o, data.policy, round_.seed)
    if cache is not None:
        _note_cache(context, data, cache, schedule)
    run_training(
        context, data, task, plan, training=round_.training, spec=spec, schedule=schedule, cache=cache
    )
    balanced = task.balanced_weights()
    if o.balance == "auto":
        _note_balance(context, task, balanced)
    if cache is not None and is_main:
        # For the report: including those of an interrupted run.
        cache.open_cached(schedule.all_views(o.epochs))
    outputs = [spec.file]
    shipped = task.shipped
    if is_main and round_.ships and built:
        with atomic_write(run / HEADS) as part:
            save_heads(task, part)
        outputs.append(HEADS)
    if is_main:
        with atomic_write(run / spec.file) as part:
            save_weights(shipped, part, weights_metadata(spec, data.classes, context.key, initial.license))
    subject = Subject(
        name=spec.name, weights=initial.weights, parameters=parameters(shipped), license=initial.license
    )
    val = compute_split_logits(context, data, spec, shipped, "val")
    if val is not None:
        subject = subject.model_copy(update={"val_score": context.task.score(*val)})
    facts: dict[str, Any] = {
        "student": subject.model_dump(exclude_none=True),
        "balance": [weight.model_dump() for weight in balanced],
    }
    if cache is not None:
        facts["teacher_cache"] = _cache_use(cache, schedule, o.epochs).model_dump()
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


def _note_cache(context: RunContext, data: TrainingData, cache: TeacherCache, schedule: ViewSchedule) -> None:
    cache.open(schedule.epoch_views(0))
    assert context.options.epochs is not None
    use, images = _cache_use(cache, schedule, context.options.epochs), len(data.train.images)
    views = f"all {use.views} views" if use.complete else format.plural(use.views, "fixed view")
    lost = "" if use.lost_mass is None else f", without {format.significant(100 * use.lost_mass)} % of p_T"
    context.display.note(
        f"teacher outputs for {views} of each image are cached in {context.cache.root}: "
        f"{use.bytes_per_view // images:,} bytes per image and view{lost}, "
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
            reason = (
                f"its gradients, or those of the labels, do not reach the last map of {context.student.name}"
            )
            if methods.load(name).gradient_ratio[1] == math.inf:
                reason = "no range of gradient ratios is known for it"
            context.display.note(f"--balance auto keeps the weight of {name}: {reason}")
