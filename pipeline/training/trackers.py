"""The log of epochs: ``metrics.jsonl``, TensorBoard, Weights & Biases and MLflow.

A tracker failure is logged once and disables that tracker for the rest of the run; it never stops training. A
resumed training continues its curves.
"""

import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..config.options import Options, get_group
from ..errors import UsageError
from ..runs.record import TrackerEntry
from ..runs.results import Epoch
from .context import RunContext

PROJECT = "questpress"
TITLES = {
    "tensorboard": "TensorBoard",
    "wandb": "Weights & Biases",
    "mlflow": "MLflow",
    "report": "Updating report.html",
}
"""Subjects of the warning, by package."""

OPEN_TIMEOUT = 30
CLOSE_TIMEOUT = 60
"""Seconds after which a server that does not respond counts as failed."""


def requested_trackers(options: Options) -> list[str]:
    """Return the packages of the trackers that the run writes to."""
    return [*(["tensorboard"] if options.tensorboard else []), *([options.track] if options.track else [])]


def check_trackers(options: Options) -> None:
    """Raise UsageError if the package of a tracker is not installed."""
    for package in requested_trackers(options):
        if importlib.util.find_spec(package) is None:
            option = "--tensorboard" if package == "tensorboard" else f"--track {package}"
            raise UsageError(f"{option}: the package {package} is not installed. Run pip install {package}.")


class Tracker(Protocol):
    """A tracker of one training."""

    def write(self, epoch: int, values: dict[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class EpochLog:
    """Appends epochs to ``metrics.jsonl`` and sends them to trackers. Only the main process does.

    Trackers are opened at the first epoch.
    """

    def __init__(self, context: RunContext, training: str) -> None:
        self.context, self.training = context, training
        self.open: dict[str, Tracker] = {}
        self.finished = False

    def __call__(self, epoch: Epoch) -> None:
        if not self.context.ranks.is_main:
            return
        # A resumed training repeats the epochs that were logged after its checkpoint.
        self.context.folder.log_epoch(epoch)
        self._try("report", self.context.write_report)
        self.context.display.detail(_format(epoch))
        self.finished = epoch.epoch == epoch.epochs
        for name in requested_trackers(self.context.options):
            self._try(name, partial(self._write, name, epoch))

    def close(self) -> None:
        for name, tracker in self.open.items():
            self._try(name, partial(tracker.close, self.finished))
        self.open.clear()

    def _write(self, name: str, epoch: Epoch) -> None:
        if name not in self.open:
            self.open[name] = TRACKERS[name](self.context, self.training, epoch.epoch)
        self.open[name].write(epoch.epoch, epoch_scalars(epoch))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        if name in self.context.failed_trackers:
            return
        try:
            action()
        except Exception as error:  # whatever a third-party package raises
            self.context.failed_trackers.add(name)
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            self.context.display.warn(
                f"{TITLES[name]} is disabled for the rest of this run: {reason.rstrip('.')}; the curves are "
                "in metrics.jsonl"
            )


def _format(epoch: Epoch) -> str:
    """Format as ``student epoch 3/20: loss 1.204, quest 0.310, val 71.2 %, 259 images/s``."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
    metrics = "".join(f", {name} {value:.4g}" for name, value in epoch.metrics.items())
    val = "" if epoch.val_accuracy is None else f", val {epoch.val_accuracy:.2f} %"
    throughput = f"{epoch.images_per_second:,.0f} images/s"
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}: {losses}{metrics}{val}, {throughput}"


def epoch_scalars(epoch: Epoch) -> dict[str, float]:
    """Return an epoch as scalars by name; unknown ones are left out."""
    scalars: dict[str, float | None] = {
        **{f"loss/{'sum' if name == 'loss' else name}": value for name, value in epoch.losses.items()},
        "accuracy/train": epoch.train_accuracy,
        "accuracy/val": epoch.val_accuracy,
        "learning_rate": epoch.learning_rate,
        **{f"metrics/{name}": value for name, value in epoch.metrics.items()},
        "speed/images_per_second": epoch.images_per_second,
        "speed/seconds": epoch.seconds,
        "speed/mfu": epoch.mfu,
        **{f"time_fraction/{phase}": fraction for phase, fraction in epoch.time_fractions.items()},
        "memory/peak_bytes": epoch.peak_memory_bytes,
    }
    return {name: value for name, value in scalars.items() if value is not None}


def run_config(options: Options, dataset: str) -> dict[str, Any]:
    """Return the resolved options that define the run, without paths of this machine."""
    excluded = {"out", "config"} | {name for name in Options.model_fields if get_group(name) == "Execution"}
    paths = {name for name in Options.model_fields if isinstance(getattr(options, name), Path)}
    kept = options.model_dump(mode="json", exclude=(excluded | paths) - {"precision"}, exclude_none=True)
    return {
        **kept,
        "data": dataset,
        "teacher_weights": [Path(source).name for source in options.teacher_weights],
        "student_weights": Path(options.student_weights).name,
    }


class TensorBoard:
    """Event files in the run folder, in ``tensorboard/TRAINING/``."""

    def __init__(self, context: RunContext, training: str, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = context.folder.path / "tensorboard" / training.replace(" ", "-")
        # Points from this epoch on belong to an attempt that was interrupted before its next checkpoint.
        self.writer: Any = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


def _recorded_run(context: RunContext, name: str, training: str) -> str | None:
    """Return the tracker's run id of this training; None if it has not been started, or with other inputs."""
    entry = context.folder.record.trackers.get(f"{name} {training}")
    return entry.run if entry is not None and entry.key == context.key else None


def _record_run(context: RunContext, name: str, training: str, run: str) -> None:
    context.folder.record.trackers[f"{name} {training}"] = TrackerEntry(key=context.key, run=run)
    context.folder.save()


def _title(context: RunContext, training: str) -> str:
    folder = context.folder.path.resolve().name
    return folder if training == "student" else f"{folder} {training}"


class WeightsAndBiases:
    """A run in the project ``questpress``; offline in the run folder without a login."""

    def __init__(self, context: RunContext, training: str, first_epoch: int) -> None:
        import wandb

        run = _recorded_run(context, "wandb", training) or uuid.uuid4().hex[:8]
        # A login prompt would block training.
        mode: Any = os.environ.get("WANDB_MODE") or (None if wandb.login(prompt=False) else "offline")
        self.run: Any = wandb.init(
            project=PROJECT,
            name=_title(context, training),
            group=context.folder.path.resolve().name,
            job_type=training,
            id=run,
            resume="allow",
            mode=mode,
            dir=str(context.folder.path),
            config=run_config(context.options, context.dataset_name),
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=OPEN_TIMEOUT, finish_timeout=CLOSE_TIMEOUT
            ),
        )
        _record_run(context, "wandb", training, run)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(values, step=epoch)  # W&B ignores steps that a resumed run repeats

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run in the experiment ``questpress``, on MLFLOW_TRACKING_URI or in the run folder."""

    def __init__(self, context: RunContext, training: str, first_epoch: int) -> None:
        # By default MLflow retries for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(OPEN_TIMEOUT))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow
        from mlflow.entities import Param

        folder = context.folder.path.resolve()
        uri = None if mlflow.is_tracking_uri_set() else f"sqlite:///{folder / 'mlflow.db'}"
        self.client: Any = mlflow.MlflowClient(tracking_uri=uri)
        run = _recorded_run(context, "mlflow", training)
        if run is not None:
            self.run = run
            self.client.update_run(run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        tags = {"training": training, "group": folder.name}
        self.run = self.client.create_run(number, run_name=_title(context, training), tags=tags).info.run_id
        config = _flatten(run_config(context.options, context.dataset_name))
        parameters = [Param(_valid_name(name), value) for name, value in config.items()]
        self.client.log_batch(self.run, params=parameters)
        _record_run(context, "mlflow", training, self.run)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_valid_name(name), value, now, epoch) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


def _valid_name(name: str) -> str:
    """Remove the characters that MLflow does not allow."""
    return re.sub(r"[^\w\-. :/]", "", name, flags=re.ASCII)


def _flatten(config: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten({f"{name}.{key}": part for key, part in value.items()})
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


TRACKERS: dict[str, Callable[[RunContext, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
