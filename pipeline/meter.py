"""What an epoch amounts to: sums of losses and right answers, kept on the device until someone looks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import JobError
from .training.compute.distributed import Ranks


class Meter:
    """Sums since the last reset; a part of the training's state, so that a resumed epoch counts whole."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device = device
        self.ranks = ranks
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0
        self.several = False

    @torch.no_grad()
    def add(self, result: Mapping[str, Tensor], labels: Tensor) -> None:
        """One batch's losses, each a mean over its images, and its answers."""
        for key, value in result.items():
            if key != "output":
                self.sums[key] = self.sums.get(key, 0) + value.detach().float() * len(labels)
        if labels.ndim == 1:
            self.correct += (result["output"].argmax(1) == labels).sum()
        self.several = labels.ndim > 1
        self.images += len(labels)

    def means(self, epoch: int, *, of_all: bool = False) -> dict[str, float]:
        """Mean losses of this rank, or of all. This is where the host waits for the device.

        Raises:
            JobError: they are not finite.
        """
        sums = torch.stack([*self.sums.values(), self._images().float()])
        *values, images = (self.ranks.sum(sums) if of_all else sums).tolist()
        means = {key: value / max(images, 1) for key, value in zip(self.sums, values, strict=True)}
        if not math.isfinite(means["loss"]):
            broken = ", ".join(key for key, value in means.items() if not math.isfinite(value))
            raise JobError(
                f"The loss became {means['loss']} in epoch {epoch + 1} ({broken}); the weights after "
                f"epoch {epoch} are kept. Try a lower --lr (or --teacher-lr), a longer --warmup-epochs "
                "or --precision fp32."
            )
        return means

    def accuracy(self) -> float | None:
        """Top-1 in percent on the training views of all ranks; None where images have several labels, whose
        ranking is not a sum over batches.
        """
        if self.several:
            return None
        correct, images = self.ranks.sum(torch.stack([self.correct, self._images()])).tolist()
        return 100 * correct / images

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks; all of them have to ask."""
        return {
            "sums": {key: self.ranks.sum(value) for key, value in self.sums.items()},
            "correct": self.ranks.sum(self.correct),
            "images": int(self.ranks.sum(self._images())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = self.ranks.of_lead(dict(state["sums"]))
        self.correct = self.ranks.of_lead({"correct": state["correct"]})["correct"]
        self.images = state["images"] if self.ranks.lead else 0

    def _images(self) -> Tensor:
        return torch.tensor(self.images, device=self.device)
