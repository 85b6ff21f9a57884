"""The training loop. It does not depend on method or dataset."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...export.runtime import Size
from ..data.augment import to_device
from ..data.render import Views, prefetch
from ..data.streaming import StreamedViews
from ..data.views import ViewSchedule, draw_endless_order, draw_order, method_keys
from ..errors import JobError
from ..methods.base import Features, RunningSums
from ..runs.process import STOP
from ..runs.results import Epoch
from ..runs.threads import ThreadTuner
from .distributed import Ranks
from .metrics import Meter
from .optimizer import Plan, build_optimizer, build_scaler, build_scheduler
from .task import DistillationTask
from .teacher_cache import TeacherCache
from .weights import Checkpoint

LOG_SECONDS = 0.5
"""Interval at which the loop waits for the device to display the losses."""

SAVE_SECONDS = 60.0
"""Least interval of checkpoints. The last epoch and a request to stop always write one."""

SAVE_FRACTION = 0.02
"""Largest fraction of the time for writing checkpoints: their interval grows with the seconds one takes."""

AGREE_SECONDS = 1.0
AGREE_STEPS = 1000
"""Interval, in seconds and at most in steps, at which all ranks wait to agree on stopping and saving."""


@dataclass(frozen=True)
class Batch:
    """Views, uint8 [B,3,H,W], and their labels: this rank's part of a step, or a micro-batch of it.

    Images without labels are last: the labels are those of the first images.
    """

    pixels: Tensor
    labels: Tensor
    keys: Tensor
    """int64 [B], the seed of the methods' random draws."""
    teachers: Sequence[Features] | None
    """Each teacher's features; None if the step computes them."""
    teacher_pixels: Tensor | None = None
    """The same views at the teachers' size, if the step computes their features and the size differs."""

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.pixels, self.labels, self.keys)
        if self.teacher_pixels is not None:
            yield self.teacher_pixels
        for features in self.teachers or ():
            yield from features.values()

    def split(self, size: int | None) -> Iterator["Batch"]:
        """Split into micro-batches of at most ``size`` images, as even as possible.

        None has a single image, which BatchNorm cannot normalize; so 3 images are one batch for ``size`` 2.
        Labeled images are spread over all; some may have none.
        """
        if size is None or size >= len(self):
            yield self
            return
        images, labeled, parts = len(self), len(self.labels), count_parts(len(self), size)
        for start, end in pairwise(images * part // parts for part in range(parts + 1)):
            first = slice(labeled * start // images, labeled * end // images)
            last = slice(labeled + start - first.start, labeled + end - first.stop)

            def take(x: Tensor, first: slice = first, last: slice = last) -> Tensor:
                return x[first] if labeled == images else torch.cat([x[first], x[last]])

            teachers = self.teachers and [{name: take(x) for name, x in t.items()} for t in self.teachers]
            teacher_pixels = None if self.teacher_pixels is None else take(self.teacher_pixels)
            yield Batch(take(self.pixels), self.labels[first], take(self.keys), teachers, teacher_pixels)


def count_parts(images: int, size: int | None) -> int:
    """Return the number of micro-batches of a step, see ``Batch.split``."""
    return 1 if size is None else max(1, min(math.ceil(images / size), images // 2))


@dataclass(frozen=True)
class BatchSource:
    """The batches of each epoch. They depend on seed, images and epoch only."""

    views: Views | StreamedViews
    schedule: ViewSchedule
    cache: TeacherCache | None
    plan: Plan
    ranks: Ranks
    device: torch.device
    teacher_size: Size | None = None
    """Side in pixels of the views that teachers of the step read; None without such teachers."""
    compute_teachers: Callable[[Tensor], Sequence[Features]] | None = None
    """Computes the teachers' features ahead of the step; None leaves that to the step."""

    def open(self, epoch: int) -> None:
        """Open the cached teacher outputs of an epoch, and compute the missing ones."""
        if self.cache is not None:
            labeled = len(self.views.labels)
            passes = self.plan.passes(epoch, labeled, len(self.views) - labeled)
            views = sorted({view for e in (epoch, *passes) for view in self.schedule.epoch_views(e)})
            self.cache.open(views)
            if self.device.type != "cpu":
                self.cache.load_to_device(views, self.device)

    def first(self) -> Batch:
        """Return the batch of the first step."""
        self.open(0)
        return next(self.batches(0, 1))

    def batches(self, epoch: int, steps: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches from step ``start`` on."""
        keys, labeled = self.views.keys, len(self.views.labels)
        size, extra = self.plan.batch_size, self.plan.unlabeled
        order = draw_order(self.plan.seed, epoch, keys[:labeled])
        numbers = self.schedule.numbers(keys[:labeled], epoch)
        draws = method_keys(self.plan.seed, keys)
        parts = [order[step * size : (step + 1) * size] for step in range(start, steps)]
        plan = [(rows, numbers[rows]) for rows in (part[self.ranks.part(len(part))] for part in parts)]
        if extra:
            first, last = (extra * (epoch * steps + step) for step in (start, steps))
            others, passes = draw_endless_order(self.plan.seed, first, last, keys[labeled:])
            others = others + labeled
            shown = (others, self.schedule.numbers(keys[others], passes))
            more = zip(*(x.view(-1, extra)[:, self.ranks.part(extra)] for x in shown), strict=True)
            plan = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(plan, more, strict=True)]
        teacher_size = self.teacher_size if self.teacher_size != self.views.size else None
        views = self.views.batches(plan, self.device, teacher_size)

        def complete() -> Iterator[Batch]:
            for (indices, numbers), (pixels, labels, *more) in zip(plan, views, strict=True):
                teachers: Sequence[Features] | None = None
                if self.cache is not None:
                    teachers = self.cache.batch(indices, numbers, self.device)
                elif self.compute_teachers is not None:
                    teachers, more = self.compute_teachers(*more or [pixels]), []
                yield Batch(pixels, labels, to_device(draws[indices], self.device), teachers, *more)

        yield from prefetch(complete(), self.device)


def train(
    task: DistillationTask,
    views: Views | StreamedViews,
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    training: str,
    evaluate: Callable[[nn.Module], float | None],
    show: Callable[[int, int, dict[str, float]], None],
    log: Callable[[Epoch], None],
    schedule: ViewSchedule | None = None,
    cache: TeacherCache | None = None,
    ranks: Ranks | None = None,
    tuner: ThreadTuner | None = None,
) -> None:
    """Train for ``plan.epochs`` epochs, resuming from the checkpoint if there is one.

    Args:
        evaluate: returns the network's accuracy on val in percent; None without val images.
        show: called twice a second with (steps done, steps, mean losses).
        schedule: chooses each epoch's view of an image; None draws a new one in each epoch.
        cache: the teachers' outputs for these views; None runs the teachers.
        tuner: adapts the number of threads to other load on the machine; None keeps it.

    Raises:
        JobError: the loss or a weight is not finite.
        KeyboardInterrupt: the job should stop; the state is saved.
    """
    ranks, tuner = ranks or Ranks(), tuner or ThreadTuner(1)
    steps = plan.steps(len(views.labels))
    task.student.labeled_fraction = plan.labeled_fraction
    optimizer = build_optimizer(task, plan)
    scheduler = build_scheduler(optimizer, plan, steps)
    scaler = build_scaler(task)
    meter = Meter(task.device, ranks, task.label_task)
    state = TrainingState(task, optimizer, scaler, meter, checkpoint, ranks)
    schedule = schedule or ViewSchedule(views.policy, views.seed)
    # On a GPU, teachers run on the next batch concurrently with the student, unless memory is short.
    concurrent = task.device.type == "cuda" and len(task.teachers) > 0 and plan.micro_batch is None
    compute_teachers = task.compute_teachers if concurrent else None
    source = BatchSource(
        views, schedule, cache, plan, ranks, task.device, task.teacher_size, compute_teachers
    )
    first_epoch, start = state.load()
    for epoch in range(first_epoch, plan.epochs):
        source.open(epoch)
        task.train()
        task.epoch = epoch
        started = shown = time.perf_counter()
        images_before = meter.images
        with STOP.defer():
            batches = task.clock.iterate("data", source.batches(epoch, steps, start))
            for step, batch in enumerate(batches, epoch * steps + start):
                # Dropout and the like draw from this seed, so that a step does not depend on those before.
                torch.manual_seed(((plan.seed * 1_000_003 + step) * 1_009 + ranks.rank) % 2**63)
                scheduler.step_update(step)
                with task.clock("student"), tuner.step():
                    optimizer.zero_grad(set_to_none=True)
                    backward(task, batch, plan.micro_batch, meter, scaler)
                    scaler.step(optimizer)
                    scaler.update()
                    task.end_step()
                now = time.perf_counter()
                if now - shown > LOG_SECONDS:
                    show(step + 1, plan.epochs * steps, meter.means(epoch))
                    shown = now
                stop, save = state.requests(step)
                if stop or save:
                    meter.means(epoch)  # raises if one is not finite
                    _check_weights_finite(task, epoch)
                    state.save(epoch, step + 1 - epoch * steps)
                if stop:
                    raise STOP.take(stop)
            losses, accuracy = meter.means(epoch, all_ranks=True), meter.accuracy()
            seconds = time.perf_counter() - started
            show((epoch + 1) * steps, plan.epochs * steps, losses)
            task.average_statistics(ranks)
            task.averages.end_epoch(plan.epochs - epoch - 1)
            log(
                Epoch(
                    stage=training,
                    epoch=epoch + 1,
                    epochs=plan.epochs,
                    images_per_second=(meter.images - images_before) * ranks.count / seconds,
                    learning_rate=optimizer.param_groups[0]["lr"],  # of the network's weights
                    losses=losses,
                    metrics={key: float(value) for key, value in task.metrics().items()},
                    train_accuracy=accuracy,
                    val_accuracy=evaluate(task.shipped),
                    seconds=seconds,
                    time_fractions=task.clock.fractions(),
                )
            )
            meter.reset()
            task.clock.reset()
            _check_weights_finite(task, epoch)
            start = 0
            stop, save = state.requests((epoch + 1) * steps, now=True)
            if stop or save or epoch + 1 == plan.epochs:
                state.save(epoch + 1, start, is_last=epoch + 1 == plan.epochs)
                stop, _ = state.requests((epoch + 1) * steps, now=True)  # a signal while it was saved
        if stop:
            raise STOP.take(stop)


def backward(
    task: DistillationTask, batch: Batch, micro_batch: int | None, meter: Meter, scaler: torch.amp.GradScaler
) -> None:
    """Compute the scaled gradients of a step's mean loss, summed over micro-batches."""
    parts = list(batch.split(micro_batch))
    for number, part in enumerate(parts, 1):
        # Ranks exchange their gradients once, with the last part's.
        with nullcontext() if number == len(parts) else task.no_sync():
            result = task(part.pixels, part.labels, part.keys, part.teachers, part.teacher_pixels)
            fraction = len(part) / len(batch)
            loss = result["loss"] * fraction if len(parts) > 1 else result["loss"]
            scaler.scale(loss).backward()
        meter.add(result, part.labels, len(part))


@dataclass
class TrainingState:
    """Saves and loads all state of a training, so that it can be resumed from any step to the bit."""

    task: DistillationTask
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    checkpoint: Checkpoint
    ranks: Ranks
    agreed_step: int = 0
    agreed_at: float = field(default_factory=time.perf_counter)
    next_agreement: int = 0
    next_save: float = 0.0
    """Time of the next checkpoint, at the earliest."""

    def requests(self, step: int, *, now: bool = False) -> tuple[int, bool]:
        """Return the request to stop (see ``runs.process``; 0 for none) and whether to save.

        Ranks agree on this once in a while, or ``now``: what one of them requests, all do.
        """
        # The other ranks do not measure how long rank 0 writes.
        save = self.ranks.is_main and time.perf_counter() > self.next_save
        if self.ranks.count == 1:
            return STOP.request if STOP.requested else 0, save
        if step < self.next_agreement and not now:
            return 0, False
        time_now = time.perf_counter()
        microseconds = 1e6 * (time_now - self.agreed_at) / max(1, step - self.agreed_step)
        stop, saves, slowest = self.ranks.max([STOP.request, save, round(microseconds)])
        steps = max(1, min(AGREE_STEPS, round(1e6 * AGREE_SECONDS / max(1, slowest))))
        self.agreed_step, self.agreed_at, self.next_agreement = step, time_now, step + steps
        return stop, saves > 0

    def save(self, epoch: int, step: int, *, is_last: bool = False) -> None:
        """Save the state after ``step`` steps of ``epoch``, the last one without the optimizer's moments.

        Every rank has to call this.
        """
        started = time.perf_counter()
        self.task.average_statistics(self.ranks)
        for sums in self.running_sums():
            sums.reduce_to_main()
        state = {
            **self.task.get_checkpoint_state(),
            "averages": self.task.averages.state_dict(),
            "optimizer": self.optimizer.state_dict() | ({"state": {}} if is_last else {}),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "epoch": epoch,
            "step": step,
        }
        if self.ranks.is_main:
            self.checkpoint.save(state)
        saved = time.perf_counter()
        self.next_save = saved + max(SAVE_SECONDS, (saved - started) / SAVE_FRACTION)

    def load(self) -> tuple[int, int]:
        """Load the checkpoint, if any, and return the epoch and its step to continue with."""
        state = self.checkpoint.load(str(self.task.device)) if self.ranks.is_main else None
        if not self.ranks.broadcast(state is not None):
            self.save(0, 0)  # so that a training that was stopped early restarts with the same weights
            return 0, 0
        state = state or self.checkpoint.load(str(self.task.device))
        if state is None:
            raise JobError(
                f"Rank {self.ranks.rank} does not find the checkpoint {self.checkpoint.path} of rank 0. "
                "--out must be on a file system that all machines share."
            )
        self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
        self.task.averages.load_state_dict(state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # only of fp16
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        for sums in self.running_sums():
            sums.sums = self.ranks.keep_on_main(sums.sums)
        self.ranks.barrier()  # before rank 0 writes the next one
        self.next_save = time.perf_counter() + SAVE_SECONDS
        return int(state["epoch"]), int(state["step"])

    def running_sums(self) -> list[RunningSums]:
        return [module for module in self.task.student.modules() if isinstance(module, RunningSums)]


def _check_weights_finite(task: DistillationTask, epoch: int) -> None:
    """Raise JobError if a weight is not finite after a step of an epoch, which has no loss yet."""
    for name, value in (*task.student.named_parameters(), *task.student.named_buffers()):
        # A method that does not know its range of gradient ratios has infinity as its end.
        if not name.startswith("balance.") and not bool(torch.isfinite(value).all()):
            raise JobError(
                f"{name} is not finite in epoch {epoch + 1}. "
                "Try a lower --lr (or --teacher-lr), a longer --warmup-epochs or --precision fp32."
            )
