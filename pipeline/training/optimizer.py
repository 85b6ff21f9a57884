"""What moves the weights: timm's optimizer over student and heads, and its schedule of the learning rate."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from ..config.defaults import ADAPTIVE_SCALE, adaptive
from .task import DistillationTask


@dataclass(frozen=True)
class Plan:
    epochs: int
    batch_size: int
    """Images of a step, over all ranks."""
    optimizer: str
    lr: float
    schedule: str
    milestones: tuple[int, ...]
    warmup_epochs: float
    weight_decay: float
    decay_all: bool
    label_smoothing: float
    seed: int
    micro_batch: int | None = None
    """Images that a rank has on its device at once; None: all of its share of a step."""

    def steps(self, images: int) -> int:
        """Steps of an epoch: full batches only, and one where there are fewer images than a batch holds."""
        return max(1, images // self.batch_size)


RISES_FROM = 25.0
"""The first learning rate is the peak's so manieth part."""

ENDS_AT = 1e4
"""The last one is the first one's so manieth part."""


class OneCycle(Scheduler):
    """From a 25th of the peak up to it within ``warmup`` steps, then down to nearly nothing, along cosines.

    Smith & Topin: "Super-Convergence", 2018, arXiv 1708.07120. The momentum stays as it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False, initialize=True)
        self.steps, self.warmup = steps, warmup
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        return [peak * self.share(t) for peak in self.base_values]

    def share(self, step: int) -> float:
        """The learning rate at a step, from 0, over the peak."""
        top, end = max(0.0, self.warmup - 1), self.steps - 1
        low, last = 1 / RISES_FROM, 1 / RISES_FROM / ENDS_AT
        if step < top:
            return _between(low, 1.0, step / top)
        return _between(1.0, last, min(1.0, (step - top) / max(1.0, end - top)))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def build_optimizer(task: DistillationTask, plan: Plan) -> torch.optim.Optimizer:
    """timm's optimizer over student and heads, biases and norms undecayed unless ``plan.decay_all``.

    A scale such as QuEST's γ goes from 3 to nearly 20 by the large steps of SGD, which the paper uses. An
    adaptive optimizer moves every parameter by about the learning rate a step, however steep its loss, and γ
    would not get there: with one, scales have a learning rate as much larger as SGD's is.
    """
    model = task.trainee
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
    # Torch's fused SGD takes no part of its weights to have a momentum yet and another part to have none.
    fused: dict[str, Any] = {"fused": True} if fuses(plan.optimizer) and not model.embeds_alone(0) else {}
    optimizer = create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=plan.optimizer,
        lr=plan.lr,
        weight_decay=decay,
        **fused,
    )
    if fused:
        optimizer.register_load_state_dict_post_hook(_lay_out)
    return optimizer


def fuses(optimizer: str) -> bool:
    """Whether torch has the optimizer's step as one operation over all parameters."""
    if optimizer.lower().startswith("lookahead_"):
        return False
    found = get_optimizer_class(optimizer, bind_defaults=False)
    return found in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Moments as their parameters lie in memory: a fused step goes through both as they lie there."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def schedule(optimizer: torch.optim.Optimizer, plan: Plan, steps: int) -> Scheduler:
    """timm's schedule of the learning rate, or a cycle of it; updated every step."""
    if plan.schedule == "onecycle":
        return OneCycle(optimizer, plan.epochs * steps, plan.warmup_epochs * steps)
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
