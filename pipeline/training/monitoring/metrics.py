"""A training's curves: what an epoch gave and cost, in ``metrics.jsonl`` and in the trackers."""

from collections.abc import Callable, Sequence

from ....models.catalogue import multiply_adds
from ... import curves
from ...mfu import peak, utilisation
from ...peak_memory import forget_peak, peak_memory
from ...runs.files import write_text
from ...runs.results import Epoch
from ..job import Job, Member
from ..task import DistillationTask
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

    They are kept in the training's checkpoint too, and told to the trackers that were asked for. Of several
    ranks one writes.
    """

    def __init__(self, job: Job, what: str) -> None:
        self.folder = job.folder
        self.detail = job.display.detail
        self.what = what
        self.lines = curves.of_training(job.folder.curves(), what)
        """This training's epochs up to now, or those of an earlier attempt."""
        self.trackers = Trackers(job, what) if job.ranks.lead else None

    def __call__(self, epoch: Epoch) -> None:
        if self.trackers is None:
            return
        others = self._others()
        known = {str(curves.training_of(line)) for line in [*others, *self.lines]}
        # An earlier attempt's epochs that are to come again go.
        before = [line for line in self.lines if curves.epoch_of(line) < epoch.epoch]
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
        return [line for line in self.folder.curves() if curves.training_of(line) != self.what]

    def _write(self, others: Sequence[str]) -> None:
        lines = [*others, *self.lines]
        if lines != curves.read(self.folder.metrics):
            write_text(self.folder.metrics, "\n".join(lines) + "\n")


def _in_words(epoch: Epoch) -> str:
    """student epoch 3/20: loss 1.204, quest 0.310, select 71.2 %, 259 images/s."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
    seen = "".join(f", {name} {value:.4g}" for name, value in epoch.watched.items())
    select = "" if epoch.select_accuracy is None else f", select {epoch.select_accuracy:.2f} %"
    rate = f"{epoch.images_per_second:,.0f} images/s"
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}: {losses}{seen}{select}, {rate}"
