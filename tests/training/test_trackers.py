"""Curves in TensorBoard, Weights & Biases and MLflow: each epoch once, never at the training's expense."""

import builtins
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from questpress.pipeline.config.options import Options
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.console import Display
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.training.compute.distributed import Ranks
from questpress.pipeline.training.job import Job
from questpress.pipeline.training.monitoring.metrics import Log
from questpress.pipeline.training.monitoring.trackers import asked, check, config, values

from tests.support import little


class Data:
    name = "shop"


def a_job(path: Path, *, fresh: bool = False, key: str = "key", **options: Any) -> Job:
    """As much of a run as its curves need, gone on with where its folder is there."""
    folder = RunFolder(path)
    folder.open(fresh=fresh)
    folder.save()
    given: dict[str, Any] = {"teacher": ["resnet50"], "student": "mobilenetv2", "out": path, **options}
    job = Job.__new__(Job)
    job.options, job.folder, job.key = Options(**given), folder, key
    job.display, job.left_aside, job.ranks = Display(quiet=True), set(), Ranks()
    data: Any = Data()
    job.data = data
    return job


def epoch(number: int, stage: str = "student", epochs: int = 4, **more: Any) -> Epoch:
    return Epoch(
        stage=stage, epoch=number, epochs=epochs, images_per_second=100.0, learning_rate=0.1,
        losses={"ce": 1 / number, "quest": 2.0, "loss": 2 + 1 / number}, **more,
    )  # fmt: skip


def train(job: Job, numbers: range, stage: str = "student", close: bool = True) -> None:
    log = Log(job, stage)
    for number in numbers:
        log(epoch(number, stage))
    if close:
        log.close()


def test_an_epoch_is_told_in_scalars_by_name_and_what_is_unknown_is_left_out():
    told = values(
        epoch(2, watched={"gamma (map)": 12.0}, val_accuracy=80.0, shares={"data": 0.25, "student": 0.75},
              mfu=0.3, peak_memory_bytes=10**9)
    )  # fmt: skip
    assert told == {
        "loss/sum": 2.5, "loss/ce": 0.5, "loss/quest": 2.0, "accuracy/val": 80.0, "learning_rate": 0.1,
        "watched/gamma (map)": 12.0, "speed/images_per_second": 100.0, "speed/mfu": 0.3,
        "speed/share_data": 0.25, "speed/share_student": 0.75, "memory/peak_bytes": 10**9,
    }  # fmt: skip


def test_the_config_holds_the_resolved_options_without_a_path_of_this_machine(tmp_path):
    job = a_job(
        tmp_path / "run", data=str(tmp_path / "photos"), data_dir=tmp_path / "d", cache=tmp_path / "c",
        teacher_weights=[str(tmp_path / "teacher.safetensors")], settings={"quest.tau": 0.2}, epochs=3,
        student_weights=str(tmp_path / "student.pt"),
    )  # fmt: skip
    told = config(job)
    assert str(tmp_path) not in json.dumps(told)
    assert told["data"] == "shop" and told["epochs"] == 3 and told["settings"] == {"quest.tau": 0.2}
    assert told["teacher_weights"] == ["teacher.safetensors"] and told["student_weights"] == "student.pt"
    assert not {"out", "quiet", "track", "cache", "data_dir"} & told.keys()


@pytest.mark.parametrize(
    ("option", "package"),
    [
        (["--tensorboard"], "tensorboard"),
        (["--track", "wandb"], "wandb"),
        (["--track", "mlflow"], "mlflow"),
    ],
)
def test_a_missing_package_is_told_before_anything_starts(
    option, package, data, cache, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    result = little.job(data, tmp_path / "run", cache, *option)
    little.refused(result, 2, " ".join(option), f"pip install 'questpress[{package}]'")
    assert not (tmp_path / "run").exists()


def test_nobody_is_asked_for_trackers_nobody_wants(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    plain = Options(teacher=["resnet50"], student="mobilenetv2")
    check(plain)
    assert asked(plain) == []
    with pytest.raises(UsageError, match="pip install"):
        check(plain.model_copy(update={"tensorboard": True}))


# TensorBoard, as its own reader reads it.


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="pip install 'questpress[tensorboard]'"
)


@needs_tensorboard
def test_tensorboard_shows_each_training_in_a_folder_of_its_own(tmp_path):
    job = a_job(tmp_path / "run", tensorboard=True)
    train(job, range(1, 3), "teacher 0")
    train(job, range(1, 5), "student")
    shown = events(tmp_path / "run" / "tensorboard" / "student")
    assert shown["loss/ce"] == [(n, pytest.approx(1 / n)) for n in (1, 2, 3, 4)]
    assert shown["loss/sum"] == [(n, pytest.approx(2 + 1 / n)) for n in (1, 2, 3, 4)]
    assert [step for step, _ in events(tmp_path / "run" / "tensorboard" / "teacher-0")["loss/ce"]] == [1, 2]


@needs_tensorboard
def test_a_training_gone_on_with_has_no_point_twice_in_tensorboard(tmp_path):
    first = a_job(tmp_path / "run", tensorboard=True)
    train(first, range(1, 4), close=False)  # killed when epoch 3 was told but not saved
    train(a_job(tmp_path / "run", tensorboard=True), range(3, 5))
    shown = events(tmp_path / "run" / "tensorboard" / "student")
    assert [step for step, _ in shown["loss/ce"]] == [1, 2, 3, 4]


@needs_tensorboard
def test_a_run_started_over_has_no_old_curves_in_tensorboard(tmp_path):
    job = a_job(tmp_path / "run", tensorboard=True)
    train(job, range(1, 3), "teacher")
    train(job, range(1, 5), "student")
    train(a_job(tmp_path / "run", fresh=True, tensorboard=True), range(1, 2))
    root = tmp_path / "run" / "tensorboard"
    assert [folder.name for folder in root.iterdir()] == ["student"]
    assert [step for step, _ in events(root / "student")["loss/ce"]] == [1]


@needs_tensorboard
def test_a_whole_job_writes_the_curves_of_its_report_for_tensorboard(data, cache, tmp_path):
    out = tmp_path / "run"
    result = little.job(data, out, cache, "--tensorboard", "--until", "student")
    assert result.exit_code == 0, result.output
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


# Weights & Biases and MLflow, by packages that write down what they are asked to do.


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


def test_wandb_gets_a_run_of_the_folders_name_offline_where_nobody_is_logged_in(wandb, tmp_path):
    train(a_job(tmp_path / "shop", track="wandb"), range(1, 5))
    (run,) = wandb.runs
    assert (run["project"], run["name"], run["group"]) == ("questpress", "shop", "shop")
    assert run["mode"] == "offline" and run["dir"] == str(tmp_path / "shop") and run["job_type"] == "student"
    assert str(tmp_path) not in json.dumps(run["config"])
    (points,) = wandb.points.values()
    assert [step for step, _ in points] == [1, 2, 3, 4] and points[1][1]["loss/ce"] == 0.5
    assert wandb.finished == [0]


@pytest.mark.parametrize(("asked_for", "mode"), [(None, None), ("disabled", "disabled")])
def test_wandb_is_online_where_somebody_is_logged_in_and_has_not_said_otherwise(
    wandb, tmp_path, monkeypatch, asked_for, mode
):
    wandb.logged_in = True
    if asked_for:
        monkeypatch.setenv("WANDB_MODE", asked_for)
    train(a_job(tmp_path / "shop", track="wandb"), range(1, 2))
    assert wandb.runs[0]["mode"] == mode


def test_a_training_gone_on_with_is_the_same_run_and_sends_no_epoch_twice(wandb, tmp_path):
    train(a_job(tmp_path / "shop", track="wandb"), range(1, 4))
    train(a_job(tmp_path / "shop", track="wandb"), range(3, 5))
    assert wandb.finished == [1, 0], "the first was broken off"
    assert len({run["id"] for run in wandb.runs}) == 1 and wandb.runs[1]["resume"] == "allow"
    (points,) = wandb.points.values()
    assert [step for step, _ in points] == [1, 2, 3, 4]


@pytest.mark.parametrize("change", [{"fresh": True}, {"key": "another"}])
def test_a_training_started_over_is_another_run(wandb, tmp_path, change):
    train(a_job(tmp_path / "shop", track="wandb"), range(1, 4))
    train(a_job(tmp_path / "shop", track="wandb", **change), range(1, 5))
    assert [[step for step, _ in points] for points in wandb.points.values()] == [[1, 2, 3], [1, 2, 3, 4]]


def test_teachers_have_runs_of_their_own_whose_names_say_so(wandb, tmp_path):
    job = a_job(tmp_path / "shop", track="wandb")
    train(job, range(1, 5), "teacher 1")
    train(job, range(1, 5), "student")
    assert [run["name"] for run in wandb.runs] == ["shop teacher 1", "shop"]
    assert {run["group"] for run in wandb.runs} == {"shop"}


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_tracker_that_fails_is_one_warning_and_left_aside_for_the_rest_of_the_run(wandb, tmp_path, broken):
    wandb.broken = broken
    job = a_job(tmp_path / "shop", track="wandb")
    train(job, range(1, 3), "teacher")
    wandb.broken = ""
    train(job, range(1, 5), "student")
    (warning,) = job.display.warnings
    assert "Weights & Biases is left aside" in warning and "and more" not in warning
    assert not any(wandb.points.values())
    assert len((tmp_path / "shop" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_package_that_cannot_be_imported_does_not_stop_a_training(tmp_path, monkeypatch):
    whole = builtins.__import__

    def broken(name: str, *more: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("of another protobuf")
        return whole(name, *more)

    monkeypatch.setattr(builtins, "__import__", broken)
    job = a_job(tmp_path / "run", tensorboard=True)
    train(job, range(1, 5))
    assert len(job.display.warnings) == 1 and "ImportError: of another protobuf" in job.display.warnings[0]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_in_a_tracker_is_the_users_and_not_a_failure(wandb, tmp_path, monkeypatch):
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(a_job(tmp_path / "run", track="wandb"), range(1, 2))


class FakeMLflow(types.ModuleType):
    """As much of MLflow as is used; a server that refuses the names the real one does."""

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


def test_mlflow_gets_a_run_in_the_run_folder_or_on_the_server_that_is_named(mlflow, tmp_path):
    job = a_job(tmp_path / "shop", track="mlflow", settings={"quest.tau": 0.2})
    train(job, range(1, 5))
    (run,) = mlflow.runs
    assert mlflow.experiments.keys() == {"questpress"}
    assert (run["name"], run["tags"]["training"], run["status"]) == ("shop", "student", "FINISHED")
    assert run["params"]["settings.quest.tau"] == "0.2" and run["params"]["student"] == "mobilenetv2"
    assert [(step, value) for key, step, value in run["points"] if key == "loss/ce"] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25),
    ]  # fmt: skip
    mlflow.uri = "https://tracking.example"
    train(a_job(tmp_path / "second", track="mlflow"), range(1, 5))
    assert mlflow.uris == [f"sqlite:///{tmp_path / 'shop' / 'mlflow.db'}", None]


def test_an_mlflow_run_is_gone_on_with_and_has_no_point_twice(mlflow, tmp_path):
    train(a_job(tmp_path / "shop", track="mlflow"), range(1, 4))
    assert mlflow.runs[0]["status"] == "KILLED"
    train(a_job(tmp_path / "shop", track="mlflow"), range(3, 5))
    (run,) = mlflow.runs
    assert [step for key, step, _ in run["points"] if key == "loss/sum"] == [1, 2, 3, 4]
    assert run["status"] == "FINISHED"


def test_names_that_mlflow_refuses_lose_what_it_refuses(mlflow, tmp_path):
    log = Log(a_job(tmp_path / "shop", track="mlflow"), "student")
    log(epoch(1, watched={"gamma (resnet50 map)": 12.0}))
    assert ("watched/gamma resnet50 map", 1, 12.0) in mlflow.runs[0]["points"]


def test_lines_of_earlier_versions_are_still_read(tmp_path):
    line = json.loads(epoch(1).model_dump_json())
    for name in ("seconds", "shares", "peak_memory_bytes", "mfu"):
        del line[name]
    job = a_job(tmp_path / "run")
    job.folder.metrics.write_text(json.dumps(line) + "\n")
    train(job, range(2, 3))
    first, second = job.folder.metrics.read_text().splitlines()
    assert Epoch.model_validate_json(first) == epoch(1) and Epoch.model_validate_json(second) == epoch(2)
