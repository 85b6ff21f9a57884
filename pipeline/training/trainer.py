"""A training within a run: its hyperparameters, engine, micro-batches, validation, log and checkpoint."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ...models.catalog import multiply_adds
from ..config.network import NetworkSpec
from ..data.dataset import Split
from ..data.render import Normalize
from ..data.training_data import TrainingData
from ..data.views import ViewSchedule
from ..errors import JobError, is_out_of_memory
from ..evaluation.predictions import compute_logits
from ..report.format import plural
from ..runs.device import Engine, allowed_precision, device_name, threads, use_threads
from ..runs.record import EngineEntry, MicroBatchEntry
from ..runs.results import Epoch
from ..runs.threads import ThreadTuner
from .context import RunContext
from .engine_search import check_compilation, find_fastest_engine
from .loop import Batch, BatchSource, count_parts, train
from .metrics import peak_flops, peak_memory, utilization
from .optimizer import Plan, build_optimizer
from .task import DistillationTask
from .teacher_cache import TeacherCache
from .trackers import EpochLog
from .weights import Checkpoint

LogitsAndLabels = tuple[np.ndarray, np.ndarray]

MIN_MICRO_BATCH = 2
"""BatchNorm needs two images."""

EARLY_STEPS = 100
"""Steps after which a network is better than guessing unless the learning rate is wrong; at least twice the
warmup.
"""


def compute_split_logits(
    context: RunContext,
    data: TrainingData,
    spec: NetworkSpec,
    network: nn.Module,
    split: Split,
    limit: int | None = None,
) -> LogitsAndLabels | None:
    """Return fp32 logits [n,classes] and labels of a split, at most of ``limit`` images; None if empty.

    The network is moved to the run's device. Each rank computes its part, so all have to call this.
    """
    pixels, labels, _ = data.rendered(split, spec, limit)
    if not len(labels):
        return None
    part = compute_logits(
        network.to(context.device),
        Normalize(spec.geometry.mean, spec.geometry.std).to(context.device),
        pixels[context.ranks.part(len(pixels))],
        Engine(context.device, threads(), "fp32"),
        partial(context.progress.update, f"evaluating {spec.name} on {split}", unit="images"),
    )
    return context.ranks.gather(part).numpy(), labels.numpy()


def build_plan(
    context: RunContext,
    data: TrainingData,
    *,
    epochs: int,
    lr: float,
    warmup_epochs: float,
    seed: int,
    unlabeled_ratio: float = 0.0,
) -> Plan:
    """Build the hyperparameters of a training; each rank gets the same number of a step's images."""
    o, ranks = context.options, context.ranks.count
    assert o.batch_size and o.optimizer and o.schedule and o.weight_decay is not None
    batch = min(o.batch_size, len(data.train.labeled)) // ranks * ranks
    return Plan(
        epochs=epochs,
        batch_size=batch,
        unlabeled=max(1, round(unlabeled_ratio * batch / ranks)) * ranks if unlabeled_ratio else 0,
        optimizer=o.optimizer,
        lr=lr,
        schedule=o.schedule,
        milestones=tuple(o.milestones or ()),
        warmup_epochs=warmup_epochs,
        weight_decay=o.weight_decay,
        decay_all=o.decay_all,
        seed=seed,
        micro_batch=o.micro_batch,
    )


class MicroBatch:
    """The size of micro-batches: as set, or halved until they fit into memory.

    The size found is recorded, so that a resumed run uses it.
    """

    def __init__(self, context: RunContext, training: str, plan: Plan) -> None:
        self.context, self.training, self.plan = context, training, plan
        recorded = context.folder.record.micro_batches.get(training)
        is_valid = recorded is not None and recorded.key == context.key
        self.size = recorded.size if recorded is not None and is_valid else plan.micro_batch

    def run(self, train: Callable[[int | None], None]) -> None:
        """Call ``train`` with the size; with half of it as long as memory is insufficient."""
        while True:
            try:
                return train(self.size)
            except RuntimeError as error:  # including torch.OutOfMemoryError
                if not is_out_of_memory(error):
                    raise
                self._halve()
            # Outside of the except block nothing refers to the failed step's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self) -> None:
        ranks, device = self.context.ranks, self.context.device
        images = self.plan.images // ranks.count
        before = math.ceil(images / count_parts(images, self.size))
        size = max(MIN_MICRO_BATCH, before // 2)
        if ranks.count > 1:
            raise JobError(
                f"Rank {ranks.rank}: not enough memory on {device} for {before} images of a step. Use "
                f"--micro-batch {size}, which accumulates the gradients of a step."
            )
        if math.ceil(images / count_parts(images, size)) >= before:
            raise JobError(
                f"Not enough memory on {device} for {before} images. Use a smaller network or --image-size."
            )
        self.size = size
        record = self.context.folder.record
        record.micro_batches[self.training] = MicroBatchEntry(key=self.context.key, size=size)
        self.context.folder.save()
        self.context.display.warn(
            f"not enough memory for {before} images: each step of {self.plan.images} is computed in "
            f"micro-batches of {size} (with their BatchNorm statistics and, for dist, feed.norm, itrd, mimic "
            "and pkd, other gradients)"
        )


def choose_run_engine(
    context: RunContext, name: str, choose: Callable[[str], Engine], precision: str | None = None
) -> Engine:
    """Return the engine of a training: the recorded one if it is resumed on the same device.

    Args:
        choose: returns an engine for a precision (``auto``, ``fp32`` or ``bf16``).
        precision: the only supported one; by default that of the options, which overrides a recorded one.
    """
    engines = context.folder.record.engines
    entry = engines.get(name)
    requested = precision or context.options.precision
    if entry is not None and entry.key == context.key and entry.device == context.device:
        recorded = Engine.from_record(entry.model_dump())
        count = context.options.threads or entry.threads
        engine = replace(recorded, threads=count)
        if requested not in ("auto", entry.precision):
            context.display.note(f"{name} was started in {entry.precision} and resumes in {requested}")
            engine = replace(engine, precision=requested, heads="as the network")
        if count != entry.threads:
            before = plural(entry.threads, "thread")
            context.display.note(f"{name} was started with {before} and resumes with {count}")
        if engine == recorded:
            return recorded
    else:
        engine = choose(requested)
    engines[name] = EngineEntry(key=context.key, name=device_name(engine.device), **asdict(engine))
    context.folder.save()
    return engine


def use_fastest_engine(
    context: RunContext, training: str, task: DistillationTask, plan: Plan, first: Batch, images: int
) -> None:
    """Let the task use the fastest engine, which is searched on the first step's batch and recorded."""
    ranks = context.ranks
    engine = _fastest_engine(context, training, task, plan, first, images) if ranks.is_main else task.engine
    engine = replace(ranks.broadcast(engine), device=task.engine.device)
    use_threads(engine.threads)
    task.use(engine)


def _fastest_engine(
    context: RunContext, training: str, task: DistillationTask, plan: Plan, first: Batch, images: int
) -> Engine:
    o, note, folder = context.options, context.display.note, context.folder
    entry = folder.record.engines[training]
    batch = first.pixels, first.labels, first.keys, first.teachers, first.teacher_pixels
    make_optimizer = partial(build_optimizer, plan=plan)
    if entry.trial is None:
        steps = plan.epochs * plan.steps(images)
        trial = find_fastest_engine(
            task,
            batch,
            make_optimizer,
            steps,
            precision=allowed_precision(task.engine.device, o.precision, task.network),
            compile=o.compile,
            note=note,
            has_micro_batches=plan.micro_batch is not None,
        )
        entry.trial = {str(engine): round(images, 1) for engine, images in trial.throughput.items()}
        if len(trial.throughput) > 1:
            note(f"engine: {trial}")
        engine = trial.engine
    else:
        engine = task.engine
        if o.compile != "auto" and (o.compile == "on") != (engine.compile != "off"):
            before, after = ("uncompiled", "compiled") if o.compile == "on" else ("compiled", "uncompiled")
            note(f"{training} was started {before} and resumes {after}")
            engine = replace(engine, compile="default" if o.compile == "on" else "off")
        engine = check_compilation(task, batch, make_optimizer, engine, note)
    folder.record.engines[training] = entry.model_copy(update=asdict(engine))
    folder.save()
    return engine


def _build_tuner(context: RunContext, training: str, engine: Engine) -> ThreadTuner:
    """Return a tuner of the number of threads, which records each choice, for a resumed run to repeat it.

    Compiled code has a fixed number. Ranks would wait for each other in a trial.
    """
    is_fixed = context.options.threads is not None or engine.compile != "off" or context.ranks.count > 1
    if is_fixed or torch.device(engine.device).type != "cpu":
        return ThreadTuner(1)
    engines = context.folder.record.engines
    most = engines[training].raced_threads or engine.threads

    def use(count: int) -> None:
        raced = most if count < most else None
        engines[training] = engines[training].model_copy(update={"threads": count, "raced_threads": raced})
        context.folder.save()
        reason = "other programs slow it down" if raced else "the processor is free again"
        context.display.note(f"{training} continues with {plural(count, 'thread')}: {reason}")

    return ThreadTuner(most, engine.threads, use)


def measure_resources(
    context: RunContext, task: DistillationTask, spec: NetworkSpec
) -> Callable[[Epoch], Epoch]:
    """Return a function that adds the peak memory and the utilization (MFU) to an epoch."""
    if torch.device(context.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    peak = peak_flops(context.device, task.engine.precision)
    macs: list[float | None] = []
    if peak is not None:
        # Teachers whose outputs are cached are not in the task and cost nothing.
        specs = [spec, *(context.round.teachers if len(task.teachers) else [])]
        macs = [multiply_adds(network.name, network.image_size, network.classes) for network in specs]

    def add(epoch: Epoch) -> Epoch:
        throughput, devices = epoch.images_per_second, context.ranks.count
        mfu = utilization(throughput, macs[0], macs[1:], peak, devices) if macs else None
        return epoch.model_copy(update={"peak_memory_bytes": peak_memory(context.device), "mfu": mfu})

    return add


def _check_loss(
    context: RunContext, training: str, spec: NetworkSpec, step: int, loss: float, lr: float
) -> None:
    """Warn if the mean label loss, in the epoch so far, is not below that of guessing."""
    guessing = context.task.guessing_loss(context.num_classes)
    if loss < guessing:
        return
    option = {"teacher": "--teacher-lr", "qat": "--qat-lr"}.get(training.split()[0], "--lr")
    context.display.warn(
        f"after {step} steps the loss of {spec.name} on labels is {loss:.3g}, not below the "
        f"{guessing:.3g} of guessing: the learning rate {lr:g} may be wrong. Try {option} {lr / 5:.2g} or "
        f"{lr * 5:.2g}"
    )


def run_training(
    context: RunContext,
    data: TrainingData,
    task: DistillationTask,
    plan: Plan,
    *,
    training: str,
    spec: NetworkSpec,
    schedule: ViewSchedule | None = None,
    cache: TeacherCache | None = None,
    search_engine: bool = True,
) -> None:
    """Train to the end of the plan, resuming from the run's checkpoint; log to ``metrics.jsonl``.

    Args:
        training: name of checkpoint and curves: ``student``, ``teacher`` …
        schedule, cache: see :func:`~questpress.pipeline.training.loop.train`.
        search_engine: search for the fastest engine before the first step.
    """
    ranks = context.ranks
    pixels, labels, _ = data.rendered("val", spec)
    schedule = schedule or ViewSchedule(data.policy, plan.seed)
    views = data.views(schedule.view_seed, spec.image_size)

    def evaluate(network: nn.Module) -> float | None:
        if not len(labels):
            return None
        part = pixels[ranks.part(len(pixels))]
        logits = ranks.gather(compute_logits(network, task.student.normalize, part, task.engine))
        return context.task.percent(logits.numpy(), labels.numpy())

    watch_loss = True

    def show(step: int, steps: int, losses: dict[str, float]) -> None:
        nonlocal watch_loss
        if watch_loss and step >= max(EARLY_STEPS, 2 * plan.warmup_epochs * steps / plan.epochs):
            watch_loss = False
            if "ce" in losses:
                label_loss = losses["ce"] / task.student.weights["ce"]
                _check_loss(context, training, spec, step, label_loss, plan.lr)
        more = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
        epoch = min(plan.epochs, 1 + step * plan.epochs // steps)
        more = f"epoch {epoch}/{plan.epochs}  {more}"
        context.progress.update(f"training {spec.name}", step, steps, "images", more, plan.images)

    tuner = None
    if search_engine:
        source = BatchSource(views, schedule, cache, plan, ranks, task.device, task.teacher_size)
        use_fastest_engine(context, training, task, plan, source.first(), len(views.labels))
        tuner = _build_tuner(context, training, task.engine)
    if ranks.count > 1:
        task.prepare_distributed(sync_bn=context.options.sync_bn)
    add_resources = measure_resources(context, task, spec)
    path = context.folder.checkpoints / f"{training}.pt"
    with closing(EpochLog(context, training)) as log:
        checkpoint = Checkpoint(path, context.key, context.display.warn)

        def train_in(size: int | None) -> None:
            if size is not None and task.engine.compile == "reduce-overhead":
                task.use(replace(task.engine, compile="default"))  # memory was too short for whole steps
            train(
                task,
                views,
                replace(plan, micro_batch=size),
                checkpoint,
                training=training,
                evaluate=evaluate,
                show=show,
                log=lambda epoch: log(add_resources(epoch)),
                schedule=schedule,
                cache=cache,
                ranks=ranks,
                tuner=tuner,
            )

        MicroBatch(context, training, plan).run(train_in)
