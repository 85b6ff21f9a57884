"""The training loop. It knows neither which method runs nor which data set."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .data.render import Views
from .data.streamed import StreamedViews
from .data.views import permutation
from .defaults import ADAPTIVE_SCALE, adaptive
from .errors import JobError
from .results import Epoch
from .task import DistillationTask

LOG_SECONDS = 0.5
"""How often the loop waits for the device to show where it is."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    schedule: str
    milestones: tuple[int, ...]
    warmup_epochs: float
    weight_decay: float
    decay_all: bool
    label_smoothing: float
    seed: int

    def steps(self, images: int) -> int:
        """Steps of an epoch: full batches only, and one where there are fewer images than a batch holds."""
        return max(1, images // self.batch_size)


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
) -> None:
    """Train ``task`` for ``plan.epochs`` epochs, going on from ``checkpoint`` where there is one.

    Args:
        evaluate: the network's top-1 in percent on the select role; None where there is no such role.
        show: called now and then with (steps done, steps in all, losses).
        log: called after each epoch.

    Raises:
        JobError: the loss is no longer a finite number.
    """
    steps = plan.steps(len(views))
    optimizer = build_optimizer(task, plan)
    scheduler = schedule(optimizer, plan, steps)
    meter = Meter(task.device)
    for epoch in range(resume(task, optimizer, checkpoint), plan.epochs):
        # Dropout and its like draw from here: an epoch repeats exactly wherever it is started from.
        torch.manual_seed(plan.seed * 1_000_003 + epoch)
        task.train()
        task.epoch = epoch
        started = looked = time.perf_counter()
        for step, (images, labels) in enumerate(
            batches(views, plan, epoch, steps, task.device), epoch * steps
        ):
            scheduler.step_update(step)
            result = task(images, labels)
            optimizer.zero_grad(set_to_none=True)
            result["loss"].backward()
            optimizer.step()
            meter.add(result, labels)
            if time.perf_counter() - looked > LOG_SECONDS:
                show(step + 1, plan.epochs * steps, meter.means(epoch))
                looked = time.perf_counter()
        losses, accuracy = meter.means(epoch), meter.accuracy()
        seconds = time.perf_counter() - started
        show((epoch + 1) * steps, plan.epochs * steps, losses)
        log(
            Epoch(
                stage=stage,
                epoch=epoch + 1,
                epochs=plan.epochs,
                images_per_second=meter.images / seconds,
                learning_rate=optimizer.param_groups[0]["lr"],  # of the weights
                losses=losses,
                watched={key: float(value) for key, value in task.watched().items()},
                train_accuracy=accuracy,
                select_accuracy=evaluate(task.network),
            )
        )
        meter.reset()
        _refuse_broken_weights(task, epoch)
        checkpoint.save(
            {**task.get_checkpoint_state(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        )


def _refuse_broken_weights(task: DistillationTask, epoch: int) -> None:
    """The last step of an epoch may break weights that its loss, measured before it, does not tell of.

    Raises:
        JobError: a weight is not a finite number.
    """
    for name, value in task.trainable_module.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise JobError(
                f"{name} is not finite after epoch {epoch + 1}; the weights after epoch {epoch} are kept. "
                "Try a lower --lr (or --teacher-lr), a longer --warmup-epochs or --precision fp32."
            )


def batches(
    views: Views | StreamedViews, plan: Plan, epoch: int, steps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's views in the epoch's order: both follow from the seed, the image and the epoch alone."""
    order = permutation(plan.seed, epoch, views.keys)
    planned = (order[step * plan.batch_size : (step + 1) * plan.batch_size] for step in range(steps))
    return views.batches(((indices, torch.full_like(indices, epoch)) for indices in planned), device)


def build_optimizer(task: DistillationTask, plan: Plan) -> torch.optim.Optimizer:
    """timm's optimizer over student and heads, biases and norms undecayed unless ``plan.decay_all``.

    A scale such as QuEST's γ goes from 3 to nearly 20 by the large steps of SGD, which the paper uses. An
    adaptive optimizer moves every parameter by about the learning rate a step, however steep its loss, and γ
    would not get there: with one, scales have a learning rate as much larger as SGD's is.
    """
    model = task.trainable_module
    decay = plan.weight_decay
    scales = task.scales()
    apart = {id(parameter) for parameter in scales}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in apart]
    undecayed = [p for name, p in rest if not plan.decay_all and (p.ndim <= 1 or name.endswith(".bias"))]
    spared = {id(parameter) for parameter in undecayed}
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in rest if id(p) not in spared], "weight_decay": decay},
        {"params": undecayed, "weight_decay": 0.0},
        {
            "params": scales,
            "weight_decay": decay if plan.decay_all else 0.0,
            "lr_scale": ADAPTIVE_SCALE if adaptive(plan.optimizer) else 1.0,
        },
    ]
    return create_optimizer_v2(
        [group for group in groups if group["params"]], opt=plan.optimizer, lr=plan.lr, weight_decay=decay
    )


def schedule(optimizer: torch.optim.Optimizer, plan: Plan, steps: int) -> Scheduler:
    """timm's schedule of the learning rate, updated every step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=plan.schedule,
        num_epochs=plan.epochs,
        decay_milestones=list(plan.milestones),
        decay_rate=0.1,
        min_lr=0.0,
        warmup_epochs=plan.warmup_epochs,  # type: ignore[arg-type]  # a part of an epoch is as good
        warmup_lr=plan.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def resume(task: DistillationTask, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> int:
    """Load the last finished epoch's state; the number of epochs that are done."""
    state = checkpoint.load(str(task.device))
    if state is None:
        return 0
    task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


class Meter:
    """Sums of losses and right answers, kept on the device until someone looks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0
        self.steps = 0

    @torch.no_grad()
    def add(self, result: dict[str, Tensor], labels: Tensor) -> None:
        for key, value in result.items():
            if key != "output":
                self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.correct += (result["output"].argmax(1) == labels).sum()
        self.images += len(labels)
        self.steps += 1

    def means(self, epoch: int) -> dict[str, float]:
        """Mean losses since the last reset. This is where the host waits for the device.

        Raises:
            JobError: they are not finite.
        """
        means: dict[str, Any] = {key: float(value) / self.steps for key, value in self.sums.items()}
        if not math.isfinite(means["loss"]):
            broken = ", ".join(key for key, value in means.items() if not math.isfinite(value))
            raise JobError(
                f"The loss became {means['loss']} in epoch {epoch + 1} ({broken}); the weights after "
                f"epoch {epoch} are kept. Try a lower --lr (or --teacher-lr), a longer --warmup-epochs "
                "or --precision fp32."
            )
        return means

    def accuracy(self) -> float:
        """Top-1 in percent on the training views since the last reset."""
        return 100 * int(self.correct) / self.images
