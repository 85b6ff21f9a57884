"""Runs of the command on the emulated device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import Result
from questpress.pipeline.runs.process import STOP
from questpress.pipeline.training import loop
from questpress.pipeline.training.metrics import Clock
from questpress.pipeline.training.task import DistillationTask

from tests.support import little
from tests.support.emulated_cuda import NAME, Device
from tests.support.toys import save_each_step


@pytest.fixture
def steps(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device, with waiting forbidden in each phase of a training step."""
    measure = Clock.__call__

    @contextmanager
    def phase(clock: Clock, name: str) -> Iterator[None]:
        with gpu.forbid_waits(), measure(clock, name):
            yield

    monkeypatch.setattr(Clock, "__call__", phase)
    return gpu


def job(data: Path, out: Path, cache: Path, *more: str) -> Result:
    return little.job(data, out, cache, "--device", "cuda", *more)


def test_resumed_run_equals_an_uninterrupted_one(
    steps: Device, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    # Steps are skipped until the scale fits, so a resumed run repeats them only with the saved scale.
    scaler = partial(torch.amp.GradScaler, "cuda", init_scale=2.0**24, growth_interval=2)
    monkeypatch.setattr(loop, "build_scaler", lambda _: scaler())
    options = ("--average-last", "2", "--baseline")
    little.check_success(job(data, tmp_path / "whole", cache, *options, "--until", "student"))
    real, count = DistillationTask.end_step, 0

    def end_step(task: DistillationTask) -> None:
        nonlocal count
        real(task)
        count += len(task.student.methods) > 0
        if count == 4:  # in the second epoch of the student
            STOP.requested = KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        save_each_step(patch)
        patch.setattr(DistillationTask, "end_step", end_step)
        assert job(data, tmp_path / "run", cache, *options).exit_code == 130
    little.check_success(job(data, tmp_path / "run", cache, *options))
    weights = (little.weights(tmp_path / name / "student.safetensors") for name in ("run", "whole"))
    assert next(weights) == next(weights)
    report = little.report(tmp_path / "run")
    assert report["student"]["parity"]["max_abs"] < 1e-4
    assert report["teacher_cache"]["computed"] == 0  # by the uninterrupted run
    assert report["baseline"]["score"]["n"] == report["student"]["score"]["n"] == 6
    engines = little.record(tmp_path / "run")["engines"].values()
    assert {(entry["name"], entry["precision"]) for entry in engines} == {(NAME, "fp16")}
    assert steps.waits  # evaluation and logging


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "quest+kd", "--cache-views", "0", "--ema", "0.9", "--crop", "resized"),
        ("--resident", "workers", "--crop", "resized", "--micro-batch", "8", "--precision", "fp32"),
        ("--resident", "host", "--method", "mimic", "--teacher", "cifar_wrn_16_2", "--qat", "--until", "qat"),
    ],
)
@pytest.mark.usefixtures("steps")
def test_run_trains_on_the_device(data: Path, cache: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    words = () if "mimic" in options else ("--set", "quest.words=8")
    fixed = (*little.NETWORKS[2:], *little.SMALL, *little.SHORT, *words)
    teacher = () if "--teacher" in options else ("--teacher", little.TEACHER)
    until = () if "--until" in options else ("--until", "student")
    places = ("--data", data, "--out", tmp_path / "run", "--cache", cache, "--device", "cuda")
    little.check_success(little.compress(*fixed, *teacher, *places, *until, *options))
