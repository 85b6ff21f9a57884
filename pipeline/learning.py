"""Training inside a run: its plan, its checkpoint, its curves and its engine."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import nn

from . import evaluate
from .checkpoint import Checkpoint
from .device import Engine, device_name, use_threads
from .files import write_text
from .job import Job
from .results import Epoch
from .task import DistillationTask
from .train import Plan, batches, build_optimizer, train
from .trial import compiled_or_not, fastest


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
            return Engine.of(entry)
        job.display.note(f"{what} was begun in {entry['precision']} and goes on in {asked}")
        chosen = replace(Engine.of(entry), precision=asked)
    else:
        chosen = choose(asked)
    engines[what] = {"key": job.key, **asdict(chosen), "name": device_name(chosen.device)}
    job.folder.save()
    return chosen


def settle(job: Job, what: str, task: DistillationTask, plan: Plan, *, begun: bool) -> None:
    """Let the task compute by the fastest engine: found once, before the first step, and recorded.

    Args:
        begun: steps were taken already, so that there is nothing to choose any more.
    """
    entry = job.folder.record["engines"][what]
    o, note = job.options, job.display.note
    batch = next(batches(job.views, plan, 0, 1, task.device))

    def optimizer(of: DistillationTask) -> torch.optim.Optimizer:
        return build_optimizer(of, plan)

    if "trial" not in entry and not begun:
        steps = plan.epochs * plan.steps(len(job.views))
        trial = fastest(task, batch, optimizer, steps, precision=o.precision, compile=o.compile, note=note)
        entry["trial"] = {str(one): round(rate, 1) for one, rate in trial.rates.items()}
        if len(trial.rates) > 1:
            note(f"engine: {trial}")
        chosen = trial.engine
    else:
        chosen = task.engine
        if o.compile != "auto" and (o.compile == "on") != (chosen.compile != "off"):
            words = ("uncompiled", "compiled")
            now = o.compile == "on"
            note(f"{what} was begun {words[not now]} and goes on {words[now]}")
            chosen = replace(chosen, compile="default" if now else "off")
        chosen = compiled_or_not(task, batch, optimizer, chosen, note)
    entry.update(asdict(chosen))
    job.folder.save()
    use_threads(chosen.threads)
    task.use(chosen)


def learn(job: Job, task: DistillationTask, plan: Plan, *, what: str, model: str) -> None:
    """Train to the plan's end, going on from the run's checkpoint; curves go to ``metrics.jsonl``.

    Args:
        what: name of the checkpoint and of the curves: ``student``, ``teacher`` …
        model: timm's name of what is trained.
    """
    checkpoint = Checkpoint(job.folder.checkpoints / f"{what}.pt", job.key)
    log = Log(job, what)
    settle(job, what, task, plan, begun=checkpoint.path.exists())
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

    train(task, job.views, plan, checkpoint, stage=what, evaluate=select_accuracy, show=show, log=log)


class Log:
    """Appends epochs to ``metrics.jsonl``, each of them once, however often the training was interrupted."""

    def __init__(self, job: Job, what: str) -> None:
        self.file = job.folder.metrics
        self.what = what

    def __call__(self, epoch: Epoch) -> None:
        kept = [
            line
            for line in (self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else [])
            if not self._replaced(json.loads(line), epoch)
        ]
        write_text(self.file, "\n".join([*kept, epoch.model_dump_json()]) + "\n")

    def _replaced(self, line: dict[str, object], epoch: Epoch) -> bool:
        """An earlier attempt's line of this training: the same epoch, or one that is to come again."""
        number = line["epoch"]
        assert isinstance(number, int)
        return line["stage"] == self.what and number >= epoch.epoch
