"""TensorBoard, Weights & Biases and MLflow: resumed curves, and failures that do not stop training."""

import builtins
import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.config.options import Options
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.console import Display
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.training.context import RunContext
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.trackers import (
    EpochLog,
    check_trackers,
    epoch_scalars,
    requested_trackers,
    run_config,
)

from tests.support import little
from tests.support.toys import CLASSIFICATION


def open_context(path: Path, *, fresh: bool = False, key: str = "key", **options: Any) -> RunContext:
    """A run in a folder, resumed if the folder exists."""
    folder = RunFolder(path)
    folder.open(fresh=fresh)
    folder.save()
    given: dict[str, Any] = {"teacher": ["resnet50"], "student": "mobilenetv2", "out": path, **options}
    unused: Any = None
    return RunContext(
        options=Options(**given), set_options=frozenset(), task=CLASSIFICATION, dataset_name="shop",
        num_classes=3, folder=folder, cache=unused, display=Display(quiet=True), progress=unused,
        device="cpu", key=key, ranks=Ranks(),
    )  # fmt: skip


def epoch(number: int, stage: str = "student", epochs: int = 4, **more: Any) -> Epoch:
    return Epoch(
        stage=stage, epoch=number, epochs=epochs, images_per_second=100.0, learning_rate=0.1,
        losses={"ce": 1 / number, "quest": 2.0, "loss": 2 + 1 / number}, **more,
    )  # fmt: skip


def train(context: RunContext, numbers: range, stage: str = "student", close: bool = True) -> None:
    log = EpochLog(context, stage)
    for number in numbers:
        log(epoch(number, stage))
    if close:
        log.close()


def test_epoch_scalars_omit_unknown_values():
    scalars = epoch_scalars(
        epoch(2, metrics={"gamma (map)": 12.0}, time_fractions={"data": 0.25, "student": 0.75},
              val_accuracy=80.0, mfu=0.3, peak_memory_bytes=10**9)
    )  # fmt: skip
    assert scalars == {
        "loss/sum": 2.5, "loss/ce": 0.5, "loss/quest": 2.0, "accuracy/val": 80.0, "learning_rate": 0.1,
        "metrics/gamma (map)": 12.0, "speed/images_per_second": 100.0, "speed/mfu": 0.3,
        "time_fraction/data": 0.25, "time_fraction/student": 0.75, "memory/peak_bytes": 10**9,
    }  # fmt: skip


def test_run_config_has_no_paths_of_this_machine(tmp_path):
    context = open_context(
        tmp_path / "run", data=str(tmp_path / "photos"), data_dir=tmp_path / "d", cache=tmp_path / "c",
        teacher_weights=[str(tmp_path / "teacher.safetensors")], settings={"quest.tau": 0.2}, epochs=3,
        student_weights=str(tmp_path / "student.pt"),
    )  # fmt: skip
    config = run_config(context.options, context.dataset_name)
    assert str(tmp_path) not in json.dumps(config)
    assert config["data"] == "shop" and config["epochs"] == 3 and config["settings"] == {"quest.tau": 0.2}
    assert config["teacher_weights"] == ["teacher.safetensors"] and config["student_weights"] == "student.pt"
    assert not {"out", "quiet", "track", "cache", "data_dir"} & config.keys()


@pytest.mark.parametrize(
    ("option", "package"),
    [(["--tensorboard"], "tensorboard"), (["--track", "wandb"], "wandb"), (["--track", "mlflow"], "mlflow")],
)
def test_missing_package_is_an_error_before_the_run(option, package, data, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = little.job(data, tmp_path / "run", cache, *option)
    little.refused(result, 2, " ".join(option), f"pip install {package}")
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_not_requested_are_not_required(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    plain = Options(teacher=["resnet50"], student="mobilenetv2")
    check_trackers(plain)
    assert requested_trackers(plain) == []
    with pytest.raises(UsageError, match="pip install"):
        check_trackers(plain.model_copy(update={"tensorboard": True}))


# TensorBoard.


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@needs_tensorboard
def test_tensorboard_has_a_folder_for_each_training(tmp_path):
    context = open_context(tmp_path / "run", tensorboard=True)
    train(context, range(1, 3), "teacher 0")
    train(context, range(1, 5), "student")
    shown = events(tmp_path / "run" / "tensorboard" / "student")
    assert shown["loss/ce"] == [(n, pytest.approx(1 / n)) for n in (1, 2, 3, 4)]
    assert shown["loss/sum"] == [(n, pytest.approx(2 + 1 / n)) for n in (1, 2, 3, 4)]
    assert [step for step, _ in events(tmp_path / "run" / "tensorboard" / "teacher-0")["loss/ce"]] == [1, 2]


@needs_tensorboard
def test_resumed_training_has_no_point_twice_in_tensorboard(tmp_path):
    first = open_context(tmp_path / "run", tensorboard=True)
    train(first, range(1, 4), close=False)  # killed after epoch 3 was logged and before it was saved
    train(open_context(tmp_path / "run", tensorboard=True), range(3, 5))
    shown = events(tmp_path / "run" / "tensorboard" / "student")
    assert [step for step, _ in shown["loss/ce"]] == [1, 2, 3, 4]


@needs_tensorboard
def test_restarted_run_has_no_old_curves_in_tensorboard(tmp_path):
    context = open_context(tmp_path / "run", tensorboard=True)
    train(context, range(1, 3), "teacher")
    train(context, range(1, 5), "student")
    train(open_context(tmp_path / "run", fresh=True, tensorboard=True), range(1, 2))
    root = tmp_path / "run" / "tensorboard"
    assert [folder.name for folder in root.iterdir()] == ["student"]
    assert [step for step, _ in events(root / "student")["loss/ce"]] == [1]


@needs_tensorboard
def test_tensorboard_has_the_curves_of_the_report(data, cache, tmp_path):
    out = tmp_path / "run"
    little.check_success(little.job(data, out, cache, "--tensorboard", "--until", "student"))
    lines = [Epoch.model_validate_json(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for what in ("teacher", "student"):
        of_training = [line for line in lines if line.stage == what]
        shown = events(out / "tensorboard" / what)
        for name, points in {
            "loss/sum": [line.losses["loss"] for line in of_training],
            "accuracy/train": [line.train_accuracy for line in of_training],
            "speed/images_per_second": [line.images_per_second for line in of_training],
        }.items():
            assert shown[name] == [(n, pytest.approx(value)) for n, value in enumerate(points, 1)]
    assert all(line.mfu is None for line in lines), "a CPU's peak is not known"
    if sys.platform != "win32":
        assert all(line.peak_memory_bytes and line.peak_memory_bytes > 10**8 for line in lines)
    assert "tensorboard" not in (out / "config.yaml").read_text()


# Weights & Biases and MLflow, by fakes that record their calls.


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.logged_in = False
        self.runs: list[dict[str, Any]] = []
        self.points: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.finished: list[int] = []
        self.broken = ""

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        return self.logged_in

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> "FakeWandb":
        if self.broken == "init":
            raise RuntimeError("no such host\nand more")
        self.runs.append(given)
        self.points.setdefault(given["id"], [])
        return self

    def log(self, point: dict[str, float], *, step: int) -> None:
        if self.broken == "log":
            raise OSError("the pipe is broken")
        self.points[self.runs[-1]["id"]].append((step, point))

    def finish(self, *, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_run_is_named_after_the_folder_and_offline_without_a_login(wandb, tmp_path):
    train(open_context(tmp_path / "shop", track="wandb"), range(1, 5))
    (run,) = wandb.runs
    assert (run["project"], run["name"], run["group"]) == ("questpress", "shop", "shop")
    assert run["mode"] == "offline" and run["dir"] == str(tmp_path / "shop") and run["job_type"] == "student"
    assert str(tmp_path) not in json.dumps(run["config"])
    (points,) = wandb.points.values()
    assert [step for step, _ in points] == [1, 2, 3, 4] and points[1][1]["loss/ce"] == 0.5
    assert wandb.finished == [0]


@pytest.mark.parametrize(("variable", "mode"), [(None, None), ("disabled", "disabled")])
def test_wandb_is_online_after_a_login_unless_wandb_mode_is_set(wandb, tmp_path, monkeypatch, variable, mode):
    wandb.logged_in = True
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    train(open_context(tmp_path / "shop", track="wandb"), range(1, 2))
    assert wandb.runs[0]["mode"] == mode


def test_resumed_training_continues_its_wandb_run(wandb, tmp_path):
    train(open_context(tmp_path / "shop", track="wandb"), range(1, 4))
    train(open_context(tmp_path / "shop", track="wandb"), range(4, 5))
    assert wandb.finished == [1, 0], "the first was interrupted"
    assert len({run["id"] for run in wandb.runs}) == 1 and wandb.runs[1]["resume"] == "allow"
    (points,) = wandb.points.values()
    assert [step for step, _ in points] == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_failed_tracker_is_disabled_with_one_warning(wandb, tmp_path, broken):
    wandb.broken = broken
    context = open_context(tmp_path / "shop", track="wandb")
    train(context, range(1, 3), "teacher")
    wandb.broken = ""
    train(context, range(1, 5), "student")
    (warning,) = context.display.warnings
    assert "Weights & Biases is disabled" in warning and "and more" not in warning
    assert not any(wandb.points.values())
    assert len((tmp_path / "shop" / "metrics.jsonl").read_text().splitlines()) == 6


def test_failed_report_is_disabled_with_one_warning(tmp_path):
    context = replace(open_context(tmp_path / "shop"), write_report=partial(json.loads, ""))
    train(context, range(1, 3))
    (warning,) = context.display.warnings
    assert "Updating report.html is disabled" in warning and "JSONDecodeError" in warning


def test_broken_package_does_not_stop_training(tmp_path, monkeypatch):
    whole = builtins.__import__

    def broken(name: str, *more: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("of another protobuf")
        return whole(name, *more)

    monkeypatch.setattr(builtins, "__import__", broken)
    context = open_context(tmp_path / "run", tensorboard=True)
    train(context, range(1, 5))
    assert (
        len(context.display.warnings) == 1
        and "ImportError: of another protobuf" in context.display.warnings[0]
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_in_a_tracker_stops_training(wandb, tmp_path, monkeypatch):
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(open_context(tmp_path / "run", track="wandb"), range(1, 2))


class FakeMLflow(types.ModuleType):
    """A fake of the used part of MLflow, which rejects the same names."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.uri = ""
        self.uris: list[str | None] = []
        self.experiments: dict[str, types.SimpleNamespace] = {}
        self.runs: list[dict[str, Any]] = []

    def is_tracking_uri_set(self) -> bool:
        return bool(self.uri)

    def MlflowClient(self, tracking_uri: str | None) -> "FakeMLflow":
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> types.SimpleNamespace | None:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = types.SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> types.SimpleNamespace:
        run = {"name": run_name, "tags": tags, "points": [], "params": {}, "status": "RUNNING"}
        self.runs.append(run)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=str(len(self.runs) - 1)))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        for key, value, _, step in metrics:
            assert not set(key) & set("()"), key
            self.runs[int(run)]["points"].append((key, step, value))
        for key, value in params:
            assert isinstance(value, str) and key not in self.runs[int(run)]["params"]
            self.runs[int(run)]["params"][key] = value

    def update_run(self, run: str, status: str) -> None:
        self.runs[int(run)]["status"] = status

    set_terminated = update_run


@pytest.fixture
def mlflow(monkeypatch) -> FakeMLflow:
    fake = FakeMLflow()
    entities: Any = types.ModuleType("mlflow.entities")
    entities.Metric = lambda *parts: parts
    entities.Param = lambda *parts: parts
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for variable in ("HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "LOGGING_LEVEL"):
        monkeypatch.setenv(f"MLFLOW_{variable}", "5")
    return fake


def test_mlflow_run_is_in_the_run_folder_or_on_the_configured_server(mlflow, tmp_path):
    context = open_context(tmp_path / "shop", track="mlflow", settings={"quest.tau": 0.2})
    train(context, range(1, 5))
    (run,) = mlflow.runs
    assert mlflow.experiments.keys() == {"questpress"}
    assert (run["name"], run["tags"]["training"], run["status"]) == ("shop", "student", "FINISHED")
    assert run["params"]["settings.quest.tau"] == "0.2" and run["params"]["student"] == "mobilenetv2"
    assert [(step, value) for key, step, value in run["points"] if key == "loss/ce"] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25),
    ]  # fmt: skip
    mlflow.uri = "https://tracking.example"
    train(open_context(tmp_path / "second", track="mlflow"), range(1, 5))
    assert mlflow.uris == [f"sqlite:///{tmp_path / 'shop' / 'mlflow.db'}", None]


def test_resumed_training_continues_its_mlflow_run(mlflow, tmp_path):
    train(open_context(tmp_path / "shop", track="mlflow"), range(1, 4))
    assert mlflow.runs[0]["status"] == "KILLED"
    train(open_context(tmp_path / "shop", track="mlflow"), range(4, 5))
    (run,) = mlflow.runs
    assert [step for key, step, _ in run["points"] if key == "loss/sum"] == [1, 2, 3, 4]
    assert run["status"] == "FINISHED"


def test_characters_that_mlflow_rejects_are_removed(mlflow, tmp_path):
    log = EpochLog(open_context(tmp_path / "shop", track="mlflow"), "student")
    log(epoch(1, metrics={"gamma (resnet50 map)": 12.0}))
    assert ("metrics/gamma resnet50 map", 1, 12.0) in mlflow.runs[0]["points"]
