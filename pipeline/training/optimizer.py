"""timm's optimizer over student and heads, and its learning rate schedule."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from ..config.defaults import ADAPTIVE_SCALE, is_adaptive
from .task import DistillationTask

DIV_FACTOR = 25.0
"""Initial learning rate = peak / DIV_FACTOR, as in torch's OneCycleLR."""

FINAL_DIV_FACTOR = 1e4
"""Final learning rate = initial learning rate / FINAL_DIV_FACTOR."""


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of one training."""

    epochs: int
    batch_size: int
    """Labeled images per step, over all ranks."""
    optimizer: str
    lr: float
    schedule: str
    milestones: tuple[int, ...]
    warmup_epochs: float
    weight_decay: float
    decay_all: bool
    seed: int
    micro_batch: int | None = None
    """Images that a rank computes at once; None for its whole part of a step."""
    unlabeled: int = 0
    """Images without labels per step, over all ranks."""

    @property
    def images(self) -> int:
        """Images per step, over all ranks."""
        return self.batch_size + self.unlabeled

    @property
    def labeled_fraction(self) -> float:
        return self.batch_size / self.images

    def steps(self, labeled: int) -> int:
        """Return the steps per epoch of this number of labeled images: full batches, but at least one."""
        return max(1, labeled // self.batch_size)

    def passes(self, epoch: int, labeled: int, unlabeled: int) -> range:
        """Return the passes over this number of unlabeled images from which an epoch's steps draw."""
        drawn = self.unlabeled * self.steps(labeled)
        return range(epoch * drawn // unlabeled, -(-(epoch + 1) * drawn // unlabeled)) if drawn else range(0)


class OneCycle(Scheduler):
    """Raise the learning rate to its peak within ``warmup`` steps and lower it to nearly 0, both by cosines.

    Smith & Topin: "Super-Convergence", 2018, arXiv 1708.07120. The momentum is constant.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False, initialize=True)
        self.steps, self.warmup = steps, warmup
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        return [peak * self.factor(t) for peak in self.base_values]

    def factor(self, step: int) -> float:
        """Return the learning rate at a step divided by the peak."""
        top, end = max(0.0, self.warmup - 1), self.steps - 1
        initial, final = 1 / DIV_FACTOR, 1 / DIV_FACTOR / FINAL_DIV_FACTOR
        if step < top:
            return _cosine(initial, 1.0, step / top)
        return _cosine(1.0, final, min(1.0, (step - top) / max(1.0, end - top)))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def build_optimizer(task: DistillationTask, plan: Plan) -> torch.optim.Optimizer:
    """Build timm's optimizer over student and heads; biases and norms decay only with ``plan.decay_all``.

    A scale such as QuEST's γ moves from 3 to nearly 20 with the large steps of SGD, which the paper uses. An
    adaptive optimizer moves each parameter by about the learning rate per step, whatever its gradient, and γ
    would not get there. So with an adaptive optimizer the learning rate of scales is larger.
    """
    student, decay = task.student, plan.weight_decay
    scales = task.scales()
    scale_ids = {id(parameter) for parameter in scales}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and id(parameter) not in scale_ids:
            is_bias_or_norm = parameter.ndim <= 1 or name.endswith(".bias")
            (undecayed if is_bias_or_norm and not plan.decay_all else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": decay},
        {"params": undecayed, "weight_decay": 0.0},
        {
            "params": scales,
            "weight_decay": decay if plan.decay_all else 0.0,
            "lr_scale": ADAPTIVE_SCALE if is_adaptive(plan.optimizer) else 1.0,
        },
    ]
    cls = get_optimizer_class(plan.optimizer, bind_defaults=False)
    # Torch's fused SGD fails if some of its weights have a momentum buffer and others do not yet.
    is_fused = cls in (SGD, Adam, AdamW) and not student.trains_projection_only(0)
    fused: dict[str, Any] = {"fused": True} if is_fused else {}
    optimizer = create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=plan.optimizer,
        lr=plan.lr,
        weight_decay=decay,
        **fused,
    )
    if fused:
        optimizer.register_load_state_dict_post_hook(_match_layouts)
    return optimizer


def build_scaler(task: DistillationTask) -> torch.amp.GradScaler:
    """Build the scaler of losses for fp16, in which small gradients would be 0; others need none.

    A step whose scaled gradients overflow is skipped, and the scale halved.
    """
    return torch.amp.GradScaler(task.device.type, enabled=task.engine.precision == "fp16")


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters, which a fused step assumes."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, steps: int) -> Scheduler:
    """Build the learning rate schedule, updated in each of the ``steps`` per epoch."""
    if plan.schedule == "onecycle":
        return OneCycle(optimizer, plan.epochs * steps, plan.warmup_epochs * steps)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=plan.schedule,
        num_epochs=plan.epochs,
        decay_milestones=list(plan.milestones),
        decay_rate=0.1,
        min_lr=0.0,
        warmup_epochs=plan.warmup_epochs,  # type: ignore[arg-type]  # a fraction works
        warmup_lr=plan.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler
