"""Training inside a run: its plan, its checkpoint, its curves and its engine."""

import json
from collections.abc import Callable
from contextlib import closing

from torch import nn

from ..models.catalogue import multiply_adds
from . import evaluate
from .checkpoint import Checkpoint
from .device import Engine, device_name
from .files import write_text
from .job import Job
from .mfu import peak, utilisation
from .peak_memory import forget_peak, peak_memory
from .results import Epoch
from .task import DistillationTask
from .trackers import Trackers
from .train import Plan, train


def plan(job: Job, *, epochs: int, lr: float, warmup_epochs: float) -> Plan:
    """How a network of this run learns."""
    o = job.options
    assert o.batch_size and o.optimizer and o.schedule
    assert o.weight_decay is not None and o.label_smoothing is not None
    return Plan(
        epochs=epochs,
        batch_size=min(o.batch_size, len(job.train.images)),
        optimizer=o.optimizer,
        lr=lr,
        schedule=o.schedule,
        milestones=tuple(o.milestones or ()),
        warmup_epochs=warmup_epochs,
        weight_decay=o.weight_decay,
        decay_all=o.decay_all,
        label_smoothing=o.label_smoothing,
        seed=o.seed,
    )


def engine(job: Job, what: str, choose: Callable[[str], Engine]) -> Engine:
    """The engine for ``what``: the one recorded where this training was begun on this device.

    A precision that is asked for wins over the recorded one. ``choose`` makes an engine from a precision.
    """
    engines = job.folder.record.setdefault("engines", {})
    entry = engines.get(what)
    asked = job.options.precision
    if entry is not None and entry["key"] == job.key and entry["device"] == job.device:
        if asked in ("auto", entry["precision"]):
            return Engine(entry["device"], entry["threads"], entry["precision"])
        job.display.note(f"{what} was begun in {entry['precision']} and goes on in {asked}")
    chosen = choose(asked)
    engines[what] = {
        "key": job.key,
        "device": chosen.device,
        "threads": chosen.threads,
        "precision": chosen.precision,
        "name": device_name(chosen.device),
    }
    job.folder.save()
    return chosen


def learn(job: Job, task: DistillationTask, plan: Plan, *, what: str, model: str) -> None:
    """Train to the plan's end, going on from the run's checkpoint; curves go to ``metrics.jsonl``.

    Args:
        what: name of the checkpoint and of the curves: ``student``, ``teacher`` …
        model: timm's name of what is trained.
    """
    checkpoint = Checkpoint(job.folder.checkpoints / f"{what}.pt", job.key)
    complete = measure(job, task, model)
    pixels, labels, _ = job.rendered("select", model)

    def select_accuracy(network: nn.Module) -> float | None:
        if not len(labels):
            return None
        answers = evaluate.logits(network, task.trainable_module.normalise, pixels, task.engine)
        return evaluate.accuracy(answers.numpy(), labels.numpy()).top1

    def show(step: int, steps: int, losses: dict[str, float]) -> None:
        more = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
        epoch = min(plan.epochs, 1 + step * plan.epochs // steps)
        job.stage.update(
            f"training {model}",
            step,
            steps,
            "images",
            f"epoch {epoch}/{plan.epochs}  {more}",
            plan.batch_size,
        )

    with closing(Log(job, what)) as log:
        train(
            task,
            job.views,
            plan,
            checkpoint,
            stage=what,
            evaluate=select_accuracy,
            show=show,
            log=lambda epoch: log(complete(epoch)),
        )


def measure(job: Job, task: DistillationTask, model: str) -> Callable[[Epoch], Epoch]:
    """What adds to an epoch the memory it took and, where the device's peak is known, its share of that."""
    forget_peak(job.device)
    best = peak(job.device, task.engine.precision)
    gmacs: list[float | None] = []
    if best is not None:
        # Teachers whose answers are stored are not in the task and cost nothing.
        asked = [model, *(job.teachers if len(task.teachers) else [])]
        gmacs = [multiply_adds(name, job.image_size, len(job.data.classes)) for name in asked]

    def complete(epoch: Epoch) -> Epoch:
        used = utilisation(epoch.images_per_second, gmacs[0], gmacs[1:], best) if gmacs else None
        return epoch.model_copy(update={"peak_memory_bytes": peak_memory(job.device), "mfu": used})

    return complete


class Log:
    """Appends epochs to ``metrics.jsonl``, each of them once, however often the training was interrupted.

    The trackers that were asked for are told of them too.
    """

    def __init__(self, job: Job, what: str) -> None:
        self.file = job.folder.metrics
        self.what = what
        self.trackers = Trackers(job, what)

    def __call__(self, epoch: Epoch) -> None:
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        before = {line: json.loads(line) for line in lines}
        kept = [line for line, content in before.items() if not self._replaced(content, epoch)]
        write_text(self.file, "\n".join([*kept, epoch.model_dump_json()]) + "\n")
        self.trackers(epoch, frozenset(str(content["stage"]) for content in before.values()))

    def close(self) -> None:
        self.trackers.close()

    def _replaced(self, line: dict[str, object], epoch: Epoch) -> bool:
        """An earlier attempt's line of this training: the same epoch, or one that is to come again."""
        number = line["epoch"]
        assert isinstance(number, int)
        return line["stage"] == self.what and number >= epoch.epoch
