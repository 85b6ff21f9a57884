"""Where a training's curves go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

They are for looking on, and may cost a training nothing: whatever fails in one of them is one warning, and it
is left aside for the rest of the run. A run that is gone on with goes on in the same curves, without a point
twice.
"""

import importlib.util
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...config.options import Options, group
from ...errors import UsageError
from ...runs.results import Epoch

if TYPE_CHECKING:
    from ..job import Job

PROJECT = "questpress"
TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}
"""The trackers by package."""

OPENING_SECONDS = 30
"""So long a server may take to answer before it is done without."""
CLOSING_SECONDS = 60


def asked(options: Options) -> list[str]:
    """The packages of the trackers that the run is to write to."""
    return [*(["tensorboard"] if options.tensorboard else []), *([options.track] if options.track else [])]


def check(options: Options) -> None:
    """
    Raises:
        UsageError: the package of a tracker is not installed.
    """
    for package in asked(options):
        if importlib.util.find_spec(package) is None:
            option = "--tensorboard" if package == "tensorboard" else f"--track {package}"
            raise UsageError(
                f"{option} needs the package {package}, which is not installed; "
                f"pip install 'questpress[{package}]'."
            )


class Tracker(Protocol):
    """One tracker of one training, open."""

    def write(self, epoch: int, values: dict[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class Trackers:
    """The trackers of one training, each opened with the first epoch it is told of.

    Args:
        what: name of the curves: ``student``, ``teacher`` …
    """

    def __init__(self, job: "Job", what: str) -> None:
        self.job = job
        self.what = what
        self.open: dict[str, Tracker] = {}
        self.finished = False

    def __call__(self, epoch: Epoch, before: frozenset[str]) -> None:
        """
        Args:
            before: the trainings that the run's curves told of before this epoch; none in a run's first.
        """
        self.finished = epoch.epoch == epoch.epochs
        for name in asked(self.job.options):
            self._try(name, lambda name=name: self._write(name, epoch, before))  # type: ignore[misc]

    def close(self) -> None:
        for name, tracker in self.open.items():
            self._try(name, lambda tracker=tracker: tracker.close(self.finished))  # type: ignore[misc]
        self.open.clear()

    def _write(self, name: str, epoch: Epoch, before: frozenset[str]) -> None:
        if name not in self.open:
            self.open[name] = OPENERS[name](self.job, self.what, epoch.epoch, before)
        self.open[name].write(epoch.epoch, values(epoch))

    def _try(self, name: str, do: Callable[[], None]) -> None:
        if name in self.job.left_aside:
            return
        try:
            do()
        # Looking on may not stop a training, whatever it is that goes wrong in somebody else's package.
        except Exception as error:
            self.job.left_aside.add(name)
            told = [type(error).__name__, *str(error).strip().splitlines()[:1]]
            self.job.display.warn(
                f"{TITLES[name]} is left aside for the rest of this run: {': '.join(told).rstrip('.')}; "
                "the curves are in metrics.jsonl as ever"
            )


def values(epoch: Epoch) -> dict[str, float]:
    """An epoch as scalars by name, those that are known."""
    found: dict[str, float | None] = {
        **{f"loss/{'sum' if name == 'loss' else name}": value for name, value in epoch.losses.items()},
        "accuracy/train": epoch.train_accuracy,
        "accuracy/val": epoch.val_accuracy,
        "learning_rate": epoch.learning_rate,
        **{f"watched/{name}": value for name, value in epoch.watched.items()},
        "speed/images_per_second": epoch.images_per_second,
        "speed/seconds": epoch.seconds,
        "speed/mfu": epoch.mfu,
        **{f"speed/share_{phase}": share for phase, share in epoch.shares.items()},
        "memory/peak_bytes": epoch.peak_memory_bytes,
    }
    return {name: value for name, value in found.items() if value is not None}


def config(job: "Job") -> dict[str, Any]:
    """The resolved options that make the job what it is, without this machine's paths."""
    o = job.options
    apart = {"out", "config"} | {name for name in Options.model_fields if group(name) == "Running"}
    paths = {name for name in Options.model_fields if isinstance(getattr(o, name), Path)}
    kept = o.model_dump(mode="json", exclude=(apart | paths) - {"precision"}, exclude_none=True)
    return {
        **kept,
        "data": job.data.name,
        "teacher_weights": [Path(source).name for source in o.teacher_weights],
        "student_weights": Path(o.student_weights).name,
    }


class TensorBoard:
    """Event files in the run folder, below ``tensorboard/``, a folder for each training."""

    def __init__(self, job: "Job", what: str, first: int, before: frozenset[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = job.folder.path / "tensorboard"
        if not before:  # of a run that was started over
            shutil.rmtree(root, ignore_errors=True)
        # Points from the first epoch on are of an attempt that was broken off before it was saved.
        self.writer: Any = SummaryWriter(str(root / what.replace(" ", "-")), purge_step=first)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class Record:
    """In ``run.json``: by which name a tracker's server knows a training, and up to which epoch."""

    def __init__(self, job: "Job", name: str, what: str, before: frozenset[str]) -> None:
        self.folder = job.folder
        entries = self.folder.record.setdefault("trackers", {})
        key = f"{name} {what}"
        # A training with another key, or of a run that was started over, has curves of its own.
        if what not in before or entries.get(key, {}).get("key") != job.key:
            entries[key] = {"key": job.key, "run": None, "epoch": 0}
        self.entry: dict[str, Any] = entries[key]

    @property
    def run(self) -> str | None:
        run: str | None = self.entry["run"]
        return run

    def begun(self, run: str) -> None:
        self.entry["run"] = run
        self.folder.save()

    def new(self, epoch: int) -> bool:
        """Whether the epoch was not sent before; a training that is gone on with repeats epochs exactly."""
        return bool(epoch > self.entry["epoch"])

    def sent(self, epoch: int) -> None:
        self.entry["epoch"] = epoch
        self.folder.save()


def _title(job: "Job", what: str) -> str:
    """The run folder's name, for the student's curves; those of a teacher say so."""
    name = job.folder.path.resolve().name
    return name if what == "student" else f"{name} {what}"


class WeightsAndBiases:
    """A run in the project ``questpress``; where nobody is logged in, offline in the run folder."""

    def __init__(self, job: "Job", what: str, first: int, before: frozenset[str]) -> None:
        import wandb

        self.record = Record(job, "wandb", what, before)
        run = self.record.run or uuid.uuid4().hex[:8]
        # Asking for a key would stop the training until somebody types one.
        mode: Any = os.environ.get("WANDB_MODE") or (None if wandb.login(prompt=False) else "offline")
        self.tracked: Any = wandb.init(
            project=PROJECT,
            name=_title(job, what),
            group=job.folder.path.resolve().name,
            job_type=what,
            id=run,
            resume="allow",
            mode=mode,
            dir=str(job.folder.path),
            config=config(job),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=OPENING_SECONDS,
                finish_timeout=CLOSING_SECONDS,
            ),
        )
        self.record.begun(run)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        if self.record.new(epoch):
            self.tracked.log(values, step=epoch)
            self.record.sent(epoch)

    def close(self, finished: bool) -> None:
        self.tracked.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run in the experiment ``questpress``, on MLFLOW_TRACKING_URI or else in the run folder."""

    def __init__(self, job: "Job", what: str, first: int, before: frozenset[str]) -> None:
        # A server that is not there is noticed in seconds, not in the minutes that MLflow would try again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(OPENING_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow
        from mlflow.entities import Param

        self.record = Record(job, "mlflow", what, before)
        own = None if mlflow.is_tracking_uri_set() else f"sqlite:///{job.folder.path.resolve() / 'mlflow.db'}"
        self.client: Any = mlflow.MlflowClient(tracking_uri=own)
        if self.record.run is not None:
            self.run = self.record.run
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        tags = {"training": what, "group": job.folder.path.resolve().name}
        self.run = self.client.create_run(number, run_name=_title(job, what), tags=tags).info.run_id
        parameters = [Param(_plain(name), _text(value)) for name, value in _flat(config(job)).items()]
        self.client.log_batch(self.run, params=parameters)
        self.record.begun(self.run)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if self.record.new(epoch):
            now = int(1000 * time.time())
            metrics = [Metric(_plain(name), value, now, epoch) for name, value in values.items()]
            self.client.log_batch(self.run, metrics=metrics)
            self.record.sent(epoch)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


def _plain(name: str) -> str:
    """With nothing but what MLflow takes in a name."""
    return re.sub(r"[^\w\-. :/]", "", name, flags=re.ASCII)


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Each setting of a method and each weight of a loss for itself."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= (
            {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


OPENERS: dict[str, Callable[["Job", str, int, frozenset[str]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
