"""The training loop. It knows neither which method runs nor which data set."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.render import Views, prefetch, to_device
from ..data.streaming import StreamedViews
from ..data.views import Schedule, method_keys, draw_order
from ..errors import JobError
from ..methods.base import Features, RunningSums
from ..runs.interrupt import STOP
from ..runs.results import Epoch
from .checkpoint import Checkpoint
from .compute.distributed import Ranks
from .monitoring.metrics import Meter
from .optimizer import Plan, build_optimizer, schedule
from .task import DistillationTask
from .teacher_cache import Store

Ask = Callable[[Tensor], Sequence[Features]]
"""Teachers: views, uint8 [B,3,S,S], to each one's readouts."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step, uint8 views [B,3,S,S] and their labels, or a part of that part."""

    pixels: Tensor
    labels: Tensor
    keys: Tensor
    """int64 [B]: what the methods' random draws follow."""
    answers: Sequence[Features] | None
    """Each teacher's, from the store or asked ahead; None where the step asks."""
    full: Tensor | None = None
    """The same views as teachers see them that the step asks; None: as the student does."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Tensor]:
        """Its tensors."""
        yield from (self.pixels, self.labels, self.keys)
        if self.full is not None:
            yield self.full
        for one in self.answers or ():
            yield from one.values()

    def split(self, size: int | None) -> Iterator["Batch"]:
        """In parts of at most ``size`` images, as even as can be; none of a single one, where BatchNorm has
        nothing to compare (so of three images, when a part may have two).
        """
        if size is None or size >= len(self):
            yield self
            return
        parts = max(1, min(math.ceil(len(self) / size), len(self) // 2))
        for part in range(parts):
            rows = slice(len(self) * part // parts, len(self) * (part + 1) // parts)
            answers: list[Features] | None = None
            if self.answers is not None:
                answers = [{name: part[rows] for name, part in one.items()} for one in self.answers]
            full = None if self.full is None else self.full[rows]
            yield Batch(self.pixels[rows], self.labels[rows], self.keys[rows], answers, full)


@dataclass(frozen=True)
class Batches:
    """An epoch's batches in the epoch's order: all of it follows from seed, image and epoch alone."""

    views: Views | StreamedViews
    views_of: Schedule
    store: Store | None
    plan: Plan
    ranks: Ranks
    device: torch.device
    teachers_size: int | None = None
    """Side in pixels of what teachers see that are asked; None: there are none."""
    ask: Ask | None = None
    """Asks the teachers about a batch ahead of its step; None leaves that to the step."""

    def open(self, epoch: int) -> None:
        """Have the store's answers at hand."""
        if self.store is not None:
            self.store.open(self.views_of.needed(epoch))
            self.store.make_resident(self.views_of.needed(epoch), self.device)

    def first(self) -> Batch:
        """The first step's."""
        self.open(0)
        return next(self.of(0, 1, 0))

    def of(self, epoch: int, steps: int, begun: int) -> Iterator[Batch]:
        """This rank's batches from step ``begun`` on."""
        keys = self.views.keys
        order = draw_order(self.plan.seed, epoch, keys)
        numbers = self.views_of.numbers(keys, epoch)
        draws = method_keys(self.plan.seed, keys)
        parts = [
            order[step * self.plan.batch_size : (step + 1) * self.plan.batch_size]
            for step in range(begun, steps)
        ]
        parts = [part[self.ranks.mine(len(part))] for part in parts]
        also = self.teachers_size if self.teachers_size != self.views.size else None
        pixels_of = self.views.batches(((indices, numbers[indices]) for indices in parts), self.device, also)

        def made() -> Iterator[Batch]:
            for indices, (pixels, labels, *more) in zip(parts, pixels_of, strict=True):
                answers: Sequence[Features] | None = None
                if self.store is not None:
                    answers = self.store.batch(indices, numbers[indices], self.device)
                elif self.ask is not None:
                    answers, more = self.ask(*more or [pixels]), []
                yield Batch(pixels, labels, to_device(draws[indices], self.device), answers, *more)

        yield from prefetch(made(), self.device)


LOG_SECONDS = 0.5
"""How often the loop waits for the device to show where it is."""

SAVE_SECONDS = 600.0
"""How often the training's state is saved within an epoch; after each epoch it is in any case."""

AGREE_SECONDS = 1.0
"""About how often ranks ask one another whether to stop: each costs all of them a moment of waiting."""

AGREE_STEPS = 1000
"""As often at least."""


def train(
    task: DistillationTask,
    views: Views | StreamedViews,
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    stage: str,
    evaluate: Callable[[nn.Module], float | None],
    show: Callable[[int, int, dict[str, float]], None],
    log: Callable[[Epoch], None],
    views_of: Schedule | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Train ``task`` for ``plan.epochs`` epochs, going on from ``checkpoint`` where there is one.

    Args:
        evaluate: the network's top-1 in percent on the val role; None where there is no such role.
        show: called now and then with (steps done, steps in all, losses).
        log: called after each epoch.
        views_of: which view an epoch shows of each image; None: a new one each epoch.
        store: the teachers' answers to these views; None asks the teachers.

    Raises:
        JobError: the loss is no longer a finite number.
        KeyboardInterrupt: someone wants the job to stop; the state of the training is saved.
    """
    ranks = ranks or Ranks()
    steps = plan.steps(len(views))
    optimizer = build_optimizer(task, plan)
    scheduler = schedule(optimizer, plan, steps)
    meter = Meter(task.device, ranks, task.label_task)
    state = TrainingState(task, optimizer, meter, checkpoint, ranks)
    views_of = views_of or Schedule(views.policy, views.seed)
    # A GPU's teachers work on the next batch beside the student; in parts of a step they wait for theirs.
    beside = task.device.type == "cuda" and len(task.teachers) > 0 and plan.micro_batch is None
    ask = task.ask if beside else None
    source = Batches(views, views_of, store, plan, ranks, task.device, task.teachers_size, ask)
    first, begun = state.load()
    for epoch in range(first, plan.epochs):
        source.open(epoch)
        task.train()
        task.epoch = epoch
        started = looked = saved = time.perf_counter()
        before = meter.images
        with STOP.waits():
            coming = task.clock.each("data", source.of(epoch, steps, begun))
            for step, batch in enumerate(coming, epoch * steps + begun):
                # Dropout and its like draw from here: a step repeats exactly wherever it is started from.
                torch.manual_seed(((plan.seed * 1_000_003 + step) * 1_009 + ranks.number) % 2**63)
                scheduler.step_update(step)
                with task.clock("student"):
                    optimizer.zero_grad(set_to_none=True)
                    backward(task, batch, plan.micro_batch, meter)
                    optimizer.step()
                    task.end_step()
                now = time.perf_counter()
                if now - looked > LOG_SECONDS:
                    show(step + 1, plan.epochs * steps, meter.means(epoch))
                    looked = now
                stop, save = state.wanted(step, now - saved > SAVE_SECONDS)
                if stop or save:
                    state.save(epoch, step + 1 - epoch * steps)
                    saved = now
                if stop:
                    raise STOP.taken(stop)
            losses, accuracy = meter.means(epoch, of_all=True), meter.accuracy()
            seconds = time.perf_counter() - started
            show((epoch + 1) * steps, plan.epochs * steps, losses)
            task.share_statistics(ranks)
            task.end_epoch(epoch, plan.epochs)
            log(
                Epoch(
                    stage=stage,
                    epoch=epoch + 1,
                    epochs=plan.epochs,
                    images_per_second=(meter.images - before) * ranks.count / seconds,
                    learning_rate=optimizer.param_groups[0]["lr"],  # of the weights
                    losses=losses,
                    watched={key: float(value) for key, value in task.watched().items()},
                    train_accuracy=accuracy,
                    val_accuracy=evaluate(task.shipped),
                    seconds=seconds,
                    shares=task.clock.shares(),
                )
            )
            meter.reset()
            task.clock.reset()
            _refuse_broken_weights(task, epoch)
            begun = 0
            state.save(epoch + 1, begun)
            stop, _ = state.wanted((epoch + 1) * steps, False, now=True)
        if stop:
            raise STOP.taken(stop)


def backward(task: DistillationTask, batch: Batch, micro_batch: int | None, meter: Meter) -> None:
    """The gradients of a step's mean loss, in parts where the device has no room for all of it."""
    parts = list(batch.split(micro_batch))
    for number, part in enumerate(parts, 1):
        # Ranks exchange their gradients once, with the last part's.
        with nullcontext() if number == len(parts) else task.no_sync():
            result = task(part.pixels, part.labels, part.keys, part.answers, part.full)
            share = len(part) / len(batch)
            (result["loss"] * share if len(parts) > 1 else result["loss"]).backward()
        meter.add(result, part.labels)


class TrainingState:
    """All that a training is, saved so that it goes on from any step as if it had never stopped."""

    def __init__(
        self,
        task: DistillationTask,
        optimizer: torch.optim.Optimizer,
        meter: Meter,
        checkpoint: Checkpoint,
        ranks: Ranks,
    ) -> None:
        self.task, self.optimizer, self.meter = task, optimizer, meter
        self.checkpoint, self.ranks = checkpoint, ranks
        self.asked, self.asked_at, self.ask_again = 0, time.perf_counter(), 0

    def wanted(self, step: int, save: bool, *, now: bool = False) -> tuple[int, bool]:
        """Which wish to stop (see ``stopping``; 0: none) and whether to save after this step: what one rank
        wants, all do, as soon as they ask one another; ``now``: they do.
        """
        if self.ranks.count == 1:
            return STOP.wish, save
        if step < self.ask_again and not now:
            return 0, False
        time_now = time.perf_counter()
        microseconds = 1e6 * (time_now - self.asked_at) / max(1, step - self.asked)
        wish, wants, slowest = self.ranks.most([STOP.wish, save, round(microseconds)])
        steps = max(1, min(AGREE_STEPS, round(1e6 * AGREE_SECONDS / max(1, slowest))))
        self.asked, self.asked_at, self.ask_again = step, time_now, step + steps
        return wish, wants > 0

    def save(self, epoch: int, step: int) -> None:
        """After ``step`` steps of ``epoch``; all ranks have to."""
        self.task.share_statistics(self.ranks)
        for watch in self.watches():
            watch.reduce_to_main()
        state = {
            **self.task.get_checkpoint_state(),
            "averages": self.task.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state_dict(),
            "epoch": epoch,
            "step": step,
        }
        if self.ranks.is_main:
            self.checkpoint.save(state)

    def load(self) -> tuple[int, int]:
        """The epoch and the step in it to go on with.

        Raises:
            JobError: the checkpoint is damaged, or a rank does not see it.
        """
        state = self.checkpoint.load(str(self.task.device)) if self.ranks.is_main else None
        if not self.ranks.share(state is not None):
            self.save(0, 0)  # whatever comes, the training can be begun again
            return 0, 0
        state = state or self.checkpoint.load(str(self.task.device))
        if state is None:
            raise JobError(
                f"Rank {self.ranks.number} does not find the checkpoint {self.checkpoint.path} that rank 0 "
                "has found: --out has to be on a file system that all machines share."
            )
        self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
        self.task.averages.load_state_dict(state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"])
        for watch in self.watches():
            watch.sums = self.ranks.of_lead(watch.sums)
        self.ranks.wait()  # before rank 0 writes the next one
        return int(state["epoch"]), int(state["step"])

    def watches(self) -> list[RunningSums]:
        return [module for module in self.task.trainee.modules() if isinstance(module, RunningSums)]


def _refuse_broken_weights(task: DistillationTask, epoch: int) -> None:
    """The last step of an epoch may break weights that its loss, measured before it, does not tell of.

    Raises:
        JobError: a weight is not a finite number.
    """
    trainee = task.trainee
    for name, value in (*trainee.named_parameters(), *trainee.named_buffers()):
        if not bool(torch.isfinite(value).all()):
            raise JobError(
                f"{name} is not finite after epoch {epoch + 1}; the weights after epoch {epoch} are kept. "
                "Try a lower --lr (or --teacher-lr), a longer --warmup-epochs or --precision fp32."
            )
