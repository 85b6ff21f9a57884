"""A training's curves: what an epoch gave and cost, in ``metrics.jsonl`` and in the trackers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....models.catalogue import multiply_adds
from ...errors import JobError
from ...runs import folder
from ...runs.files import write_text
from ...runs.results import Epoch
from ...tasks import Task
from ..compute.distributed import Ranks
from ..job import Job, NetworkSpec
from ..task import DistillationTask
from .profiling import forget_peak, peak, peak_memory, utilisation
from .trackers import Trackers


def measured(job: Job, task: DistillationTask, member: NetworkSpec) -> Callable[[Epoch], Epoch]:
    """What adds to an epoch the memory it took and, where the device's peak is known, its share of that."""
    forget_peak(job.device)
    best = peak(job.device, task.engine.precision)
    gmacs: list[float | None] = []
    if best is not None:
        # Teachers whose answers are stored are not in the task and cost nothing.
        asked = [member, *(job.current_teachers if len(task.teachers) else [])]
        gmacs = [multiply_adds(one.name, one.image_size, one.classes) for one in asked]

    def complete(epoch: Epoch) -> Epoch:
        used = None
        if gmacs:
            rate, devices = epoch.images_per_second, job.ranks.count
            used = utilisation(rate, gmacs[0], gmacs[1:], best, devices=devices)
        return epoch.model_copy(update={"peak_memory_bytes": peak_memory(job.device), "mfu": used})

    return complete


class Log:
    """Appends epochs to ``metrics.jsonl``, each of them once, however often the training was interrupted.

    They are kept in the training's checkpoint too, and told to the trackers that were asked for. Of several
    ranks one writes.
    """

    def __init__(self, job: Job, what: str) -> None:
        self.folder = job.folder
        self.detail = job.display.detail
        self.what = what
        self.lines = folder.select_training(job.folder.curves(), what)
        """This training's epochs up to now, or those of an earlier attempt."""
        self.trackers = Trackers(job, what) if job.ranks.is_main else None

    def __call__(self, epoch: Epoch) -> None:
        if self.trackers is None:
            return
        others = self._others()
        known = {str(folder.get_training(line)) for line in [*others, *self.lines]}
        # An earlier attempt's epochs that are to come again go.
        before = [line for line in self.lines if folder.get_epoch(line) < epoch.epoch]
        self.lines = [*before, epoch.model_dump_json()]
        self._write(others)
        self.detail(_in_words(epoch))
        self.trackers(epoch, frozenset(known))

    def go_on(self, lines: Sequence[str]) -> None:
        """Go on from these epochs, which a checkpoint has kept."""
        self.lines = list(lines)
        if self.trackers is not None:
            self._write(self._others())

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()

    def _others(self) -> list[str]:
        """The epochs of other trainings."""
        return [line for line in self.folder.curves() if folder.get_training(line) != self.what]

    def _write(self, others: Sequence[str]) -> None:
        lines = [*others, *self.lines]
        if lines != folder.read_curves(self.folder.metrics):
            write_text(self.folder.metrics, "\n".join(lines) + "\n")


def _in_words(epoch: Epoch) -> str:
    """student epoch 3/20: loss 1.204, quest 0.310, val 71.2 %, 259 images/s."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
    seen = "".join(f", {name} {value:.4g}" for name, value in epoch.watched.items())
    val = "" if epoch.val_accuracy is None else f", val {epoch.val_accuracy:.2f} %"
    rate = f"{epoch.images_per_second:,.0f} images/s"
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}: {losses}{seen}{val}, {rate}"


class Meter:
    """Sums since the last reset; a part of the training's state, so that a resumed epoch counts whole."""

    def __init__(self, device: torch.device, ranks: Ranks, label_task: Task) -> None:
        self.device = device
        self.ranks = ranks
        self.label_task = label_task
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0
        self.has_accuracy = True

    @torch.no_grad()
    def add(self, result: Mapping[str, Tensor], labels: Tensor) -> None:
        """One batch's losses, each a mean over its images, and its answers."""
        for key, value in result.items():
            if key != "output":
                self.sums[key] = self.sums.get(key, 0) + value.detach().float() * len(labels)
        correct = self.label_task.count_correct(result["output"], labels)
        self.has_accuracy = correct is not None
        if correct is not None:
            self.correct += correct
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
        """Return the percentage of correct training views of all ranks; None if the task counts none."""
        if not self.has_accuracy:
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
        self.images = state["images"] if self.ranks.is_main else 0

    def _images(self) -> Tensor:
        return torch.tensor(self.images, device=self.device)
