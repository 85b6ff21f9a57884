"""Training inside a run: its plan, its checkpoint, its curves and its engine."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace

import torch
from torch import nn

from ..data.views import Schedule
from ..errors import JobError, is_out_of_memory
from ..evaluation.inference import compute_logits
from ..runs.device import Engine, device_name, use_threads
from ..runs.record import EngineEntry, MicroBatchEntry
from ..tasks import task_of
from .checkpoint import Checkpoint
from .compute.engine_search import compiled_or_not, fastest
from .job import Job, NetworkSpec
from .loop import Batch, Batches, train
from .monitoring.metrics import Log, measured
from .optimizer import Plan, build_optimizer
from .task import DistillationTask
from .teacher_cache import Store

SMALLEST = 2
"""BatchNorm needs two."""


class MicroBatch:
    """The size, as asked for or as found; what was found is recorded, so that a resumed run repeats it."""

    def __init__(self, job: Job, what: str, plan: Plan) -> None:
        self.job, self.what, self.plan = job, what, plan
        self.share = plan.batch_size // job.ranks.count
        recorded = job.folder.record.micro_batches.get(what)
        found = recorded.size if recorded and recorded.key == job.key else None
        self.size: int | None = found or plan.micro_batch

    def fits(self, train: Callable[[int | None], None]) -> bool:
        """Train in parts of this size; where memory runs out, halve it and answer False.

        Raises:
            JobError: there is no memory for the smallest part.
        """
        try:
            train(self.size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            self._halve()
        else:
            return True
        # Here nothing of the failed step is referred to any more.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _halve(self) -> None:
        before = min(self.size or self.share, self.share)
        size = max(SMALLEST, before // 2)
        if self.job.ranks.count > 1:
            raise JobError(
                f"Rank {self.job.ranks.number} has no memory on {self.job.device} for {before} images of a "
                f"step; --micro-batch {size} keeps the step and computes it in parts."
            )
        if size >= before:
            raise JobError(
                f"{self.job.device} has no memory for {before} images at once; take a smaller network or "
                "--image-size, or free its memory."
            )
        self.size = size
        self.job.folder.record.micro_batches[self.what] = MicroBatchEntry(key=self.job.key, size=size)
        self.job.folder.save()
        self.job.display.warn(
            f"no memory for {before} images at once: each step of {self.plan.batch_size} is taken in parts "
            f"of {size} (its gradients are the same; BatchNorm's statistics are those of the parts)"
        )


def plan(job: Job, *, epochs: int, lr: float, warmup_epochs: float, seed: int) -> Plan:
    """How a network of this run learns."""
    o = job.options
    assert o.batch_size and o.optimizer and o.schedule
    assert o.weight_decay is not None and o.label_smoothing is not None
    batch = min(o.batch_size, len(job.train.images))
    return Plan(
        epochs=epochs,
        batch_size=batch - batch % job.ranks.count,  # all ranks have as much of a step
        optimizer=o.optimizer,
        lr=lr,
        schedule=o.schedule,
        milestones=tuple(o.milestones or ()),
        warmup_epochs=warmup_epochs,
        weight_decay=o.weight_decay,
        decay_all=o.decay_all,
        label_smoothing=o.label_smoothing,
        seed=seed,
        micro_batch=o.micro_batch,
    )


def engine(job: Job, what: str, choose: Callable[[str], Engine], precision: str | None = None) -> Engine:
    """The engine for ``what``: the one recorded where this training was begun on this device.

    A precision that is asked for wins over the recorded one. ``choose`` makes an engine from a precision.

    Args:
        precision: the only one that ``what`` can have, whatever is asked for.
    """
    engines = job.folder.record.engines
    entry = engines.get(what)
    asked = precision or job.options.precision
    if entry is not None and entry.key == job.key and entry.device == job.device:
        if asked in ("auto", entry.precision):
            return Engine.of(entry.model_dump())
        job.display.note(f"{what} was begun in {entry.precision} and goes on in {asked}")
        chosen = replace(Engine.of(entry.model_dump()), precision=asked, heads="as the network")
    else:
        chosen = choose(asked)
    engines[what] = EngineEntry(key=job.key, name=device_name(chosen.device), **asdict(chosen))
    job.folder.save()
    return chosen


def settle(job: Job, what: str, task: DistillationTask, plan: Plan, first: Batch, images: int) -> None:
    """Let the task compute by the fastest engine: found once, before the first step, and recorded.

    Args:
        first: the first step's batch.
        images: how many there are in all.
    """
    chosen = _settled(job, what, task, plan, first, images) if job.ranks.is_main else task.engine
    # Of several ranks one tries, and all take what it has found.
    chosen = replace(job.ranks.share(chosen), device=task.engine.device)
    use_threads(chosen.threads)
    task.use(chosen)


def _settled(job: Job, what: str, task: DistillationTask, plan: Plan, first: Batch, images: int) -> Engine:
    entry = job.folder.record.engines[what]
    o, note = job.options, job.display.note
    batch = first.pixels, first.labels, first.keys, first.answers, first.full

    def optimizer(of: DistillationTask) -> torch.optim.Optimizer:
        return build_optimizer(of, plan)

    if entry.trial is None:
        steps = plan.epochs * plan.steps(images)
        trial = fastest(task, batch, optimizer, steps, precision=o.precision, compile=o.compile, note=note)
        entry.trial = {str(one): round(rate, 1) for one, rate in trial.rates.items()}
        if len(trial.rates) > 1:
            note(f"engine: {trial}")
        chosen = trial.engine
    else:
        chosen = task.engine
        if o.compile != "auto" and (o.compile == "on") != (chosen.compile != "off"):
            words = ("uncompiled", "compiled")
            now = o.compile == "on"
            note(f"{what} was begun {words[not now]} and goes on {words[now]}")
            chosen = replace(chosen, compile="default" if now else "off")
        chosen = compiled_or_not(task, batch, optimizer, chosen, note)
    job.folder.record.engines[what] = entry.model_copy(update=asdict(chosen))
    job.folder.save()
    return chosen


def learn(
    job: Job,
    task: DistillationTask,
    plan: Plan,
    *,
    what: str,
    member: NetworkSpec,
    views_of: Schedule | None = None,
    store: Store | None = None,
    race: bool = True,
) -> None:
    """Train to the plan's end, going on from the run's checkpoint; curves go to ``metrics.jsonl``.

    Args:
        what: name of the checkpoint and of the curves: ``student``, ``teacher`` …
        member: the network that is trained.
        views_of: which views it is shown; None: new ones each epoch.
        store: the teachers' answers to them; None asks the teachers.
        race: whether other engines than the task's are tried before the first step.

    Raises:
        JobError: there is no memory for even the smallest part of a step.
    """
    pixels, labels, _ = job.rendered("val", member)
    views_of = views_of or Schedule(job.policy, plan.seed)
    views = job.views_drawn_with(views_of.view_seed, member.image_size)

    def val_accuracy(network: nn.Module) -> float | None:
        if not len(labels):
            return None
        mine = pixels[job.ranks.mine(len(pixels))]
        answers = job.ranks.gather(compute_logits(network, task.trainee.normalise, mine, task.engine))
        return task_of(job.data).percent(answers.numpy(), labels.numpy())

    def show(step: int, steps: int, losses: dict[str, float]) -> None:
        more = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
        epoch = min(plan.epochs, 1 + step * plan.epochs // steps)
        job.stage.update(
            f"training {member.name}",
            step,
            steps,
            "images",
            f"epoch {epoch}/{plan.epochs}  {more}",
            plan.batch_size,
        )

    source = Batches(views, views_of, store, plan, job.ranks, task.device, task.teachers_size)
    if race:
        settle(job, what, task, plan, source.first(), len(views))
    if job.ranks.count > 1:
        task.prepare_distributed(sync_bn=job.options.sync_bn)
    parts = MicroBatch(job, what, plan)
    complete = measured(job, task, member)
    with closing(Log(job, what)) as log:
        checkpoint = Checkpoint(job.folder.checkpoints / f"{what}.pt", job.key, job.display.warn, log)
        while not parts.fits(
            lambda size: train(
                task,
                views,
                replace(plan, micro_batch=size),
                checkpoint,
                stage=what,
                evaluate=val_accuracy,
                show=show,
                log=lambda epoch: log(complete(epoch)),
                views_of=views_of,
                store=store,
                ranks=job.ranks,
            )
        ):
            pass
