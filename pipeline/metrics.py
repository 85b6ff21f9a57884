"""A training's curves: what an epoch gave and cost, in ``metrics.jsonl`` and in the trackers."""

import json
from collections.abc import Callable

from ..models.catalogue import multiply_adds
from .files import write_text
from .job import Job, Member
from .mfu import peak, utilisation
from .peak_memory import forget_peak, peak_memory
from .results import Epoch
from .task import DistillationTask
from .trackers import Trackers


def measured(job: Job, task: DistillationTask, member: Member) -> Callable[[Epoch], Epoch]:
    """What adds to an epoch the memory it took and, where the device's peak is known, its share of that."""
    forget_peak(job.device)
    best = peak(job.device, task.engine.precision)
    gmacs: list[float | None] = []
    if best is not None:
        # Teachers whose answers are stored are not in the task and cost nothing.
        asked = [member, *(job.tutors if len(task.teachers) else [])]
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

    The trackers that were asked for are told of them too. Of several ranks one writes.
    """

    def __init__(self, job: Job, what: str) -> None:
        self.file = job.folder.metrics
        self.detail = job.display.detail
        self.what = what
        self.trackers = Trackers(job, what) if job.ranks.lead else None

    def __call__(self, epoch: Epoch) -> None:
        if self.trackers is None:
            return
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        before = {line: json.loads(line) for line in lines}
        kept = [line for line, content in before.items() if not self._replaced(content, epoch)]
        write_text(self.file, "\n".join([*kept, epoch.model_dump_json()]) + "\n")
        self.detail(_in_words(epoch))
        self.trackers(epoch, frozenset(str(content["stage"]) for content in before.values()))

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()

    def _replaced(self, line: dict[str, object], epoch: Epoch) -> bool:
        """An earlier attempt's line of this training: the same epoch, or one that is to come again."""
        number = line["epoch"]
        assert isinstance(number, int)
        return line["stage"] == self.what and number >= epoch.epoch


def _in_words(epoch: Epoch) -> str:
    """student epoch 3/20: loss 1.204, quest 0.310, select 71.2 %, 259 images/s."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
    seen = "".join(f", {name} {value:.4g}" for name, value in epoch.watched.items())
    select = "" if epoch.select_accuracy is None else f", select {epoch.select_accuracy:.2f} %"
    rate = f"{epoch.images_per_second:,.0f} images/s"
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}: {losses}{seen}{select}, {rate}"
