"""Stopping at any step by a signal or --time-limit, and resuming to the bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from questpress.pipeline import stages
from questpress.pipeline.config.options import parse_time
from questpress.pipeline.runs import process
from questpress.pipeline.runs.process import STOP, TIME_LIMIT_EXIT, TimeLimit
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.training import loop
from questpress.pipeline.training.loop import train
from questpress.pipeline.training.task import DistillationTask
from questpress.pipeline.training.weights import Checkpoint
from timm.layers import DropPath
from torch import nn

from tests.support import little
from tests.support.little import job, report, weights
from tests.support.toys import distillation, equal, plan, state, supervised, views

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture(autouse=True)
def reset_stop() -> Iterator[None]:
    STOP._reset()
    yield
    STOP._reset()


def dropping() -> DistillationTask:
    """A network with dropout and stochastic depth."""
    task = supervised()
    block = task.network.get_submodule("layer2")
    task.network.layer2 = nn.Sequential(block, nn.Dropout(0.2), DropPath(0.2))
    return task


KINDS: dict[str, tuple[Callable[[], DistillationTask], dict[str, Any]]] = {
    "adam": (distillation, {}),
    "momentum": (distillation, {"optimizer": "sgd", "lr": 0.02}),
    "milestones": (supervised, {"schedule": "multistep", "milestones": (1, 2)}),
    "dropout": (dropping, {}),
    "running mean": (lambda: supervised(ema=0.9), {}),
    "average": (lambda: supervised(average_last=2), {}),
    "balance": (lambda: distillation(balance=True, weights={"quest": 100.0}), {}),
    "parts": (distillation, {"micro_batch": 3}),
    "unlabeled": (distillation, {"unlabeled": 5, "micro_batch": 7}),
}


def learn(task: DistillationTask, file: Path, stop_after: int | None = None, **changes: Any) -> list[Epoch]:
    """Train, and request a stop at the end of step number ``stop_after``."""
    epochs: list[Epoch] = []
    real, done = task.end_step, [0]

    def end_step() -> None:
        real()
        done[0] += 1
        if done[0] == stop_after:
            signal.raise_signal(signal.SIGTERM)

    task.end_step = end_step  # type: ignore[method-assign]
    given = views(47, labeled=40) if "unlabeled" in changes else views(40)
    with STOP.handle_signals():
        train(
            task, given, plan(**changes), Checkpoint(file, "key"), training="student",
            evaluate=lambda _: None, show=lambda *_: None, log=epochs.append,
        )  # fmt: skip
    return epochs


def drop_times(epoch: Epoch) -> dict[str, Any]:
    """Return an epoch without its times."""
    timed = {"images_per_second", "seconds", "time_fractions", "peak_memory_bytes", "mfu"}
    return epoch.model_dump(exclude=timed)


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory) -> tuple[str, DistillationTask, list[Epoch]]:
    make, changes = KINDS[request.param]
    task = make()
    return request.param, task, learn(task, tmp_path_factory.mktemp("whole") / "c.pt", **changes)


@posix
@pytest.mark.parametrize("stop_after", [2, 5, 8])  # in an epoch of five steps, at its end, in the next one
def test_training_stopped_at_a_step_resumes_to_the_bit(tmp_path, uninterrupted, stop_after):
    kind, whole, curve = uninterrupted
    make, changes = KINDS[kind]
    with pytest.raises(KeyboardInterrupt):
        learn(make(), tmp_path / "c.pt", stop_after, **changes)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["epoch"] * 5 + saved["step"] == stop_after
    resumed = make()
    with torch.no_grad():  # what the new process starts from must not matter
        for parameter in resumed.student.parameters():
            parameter.add_(1)
    rest = learn(resumed, tmp_path / "c.pt", **changes)
    assert equal(state(resumed), state(whole))
    assert equal(dict(resumed.shipped.state_dict()), dict(whole.shipped.state_dict()))
    assert [drop_times(epoch) for epoch in rest] == [drop_times(epoch) for epoch in curve[saved["epoch"] :]]
    assert resumed.balanced_weights() == whole.balanced_weights()


# An epoch has five steps of 10 s. After a checkpoint of 3 s, the next one waits for 150 s.
@pytest.mark.parametrize(("cost", "expected"), [(1, [(1, 2), (2, 4)]), (3, [(3, 1)])])
def test_checkpoints_are_written_once_a_minute_or_for_2_percent_of_the_time(
    tmp_path, monkeypatch, cost, expected
):
    now, places, real = [0.0], [], Checkpoint.save
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def save(checkpoint: Checkpoint, saved: dict[str, Any]) -> None:
        places.append((saved["epoch"], saved["step"]))
        now[0] += cost
        real(checkpoint, saved)

    def end_step() -> None:
        now[0] += 10

    monkeypatch.setattr(Checkpoint, "save", save)
    task = supervised()
    task.end_step = end_step  # type: ignore[method-assign]
    learn(task, tmp_path / "c.pt", epochs=4)
    assert places == [(0, 0), *expected, (4, 0)]


@posix
def test_signal_at_the_end_of_an_epoch_saves_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_check_weights_finite", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        learn(supervised(), tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 0)


@posix
def test_second_signal_stops_at_once_and_an_echo_does_not(monkeypatch):
    with STOP.handle_signals():
        with STOP.defer():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a scheduler's and torchrun's
            assert STOP.requested is KeyboardInterrupt
            monkeypatch.setattr(process, "SAME_SIGNAL_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        STOP._reset()
        with pytest.raises(KeyboardInterrupt):  # outside of a training nothing waits
            signal.raise_signal(signal.SIGINT)


@posix
def test_signal_handlers_are_restored(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with STOP.handle_signals():
        assert signal.getsignal(signal.SIGTERM) == STOP._on_signal
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    # nohup and a shell's background jobs
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with STOP.handle_signals():
        pass
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@posix
def test_time_limit_interrupts_waiting_and_ends_with_its_block():
    with STOP.handle_signals():
        begun = time.monotonic()
        with pytest.raises(TimeLimit), STOP.limit_time(0.2):
            subprocess.run(["sleep", "20"])
        assert time.monotonic() - begun < 10
        with STOP.limit_time(0.2):
            pass
        time.sleep(0.4)  # nothing comes any more


def test_time_limit_works_in_a_thread(tmp_path):
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with STOP.handle_signals(), STOP.limit_time(0.5):
                train(
                    supervised(), views(40), plan(epochs=10_000), Checkpoint(tmp_path / "c.pt", "key"),
                    training="student", evaluate=lambda _: None, show=lambda *_: None, log=lambda _: None,
                )  # fmt: skip
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [type(error) for error in errors] == [TimeLimit]
    assert torch.load(tmp_path / "c.pt", weights_only=True)["epoch"] < 10_000


@pytest.mark.parametrize(
    ("text", "expected"), [("3h50m", 13_800), ("90m", 5400), ("45s", 45), ("2d", 172_800), ("1.5h", 5400)]
)
def test_durations_are_parsed(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize("text", ["", "90", "1h30", "h", "-5m", "5 m", "\udcff", "9" * 20 + "d", "0s"])
def test_invalid_time_limit_is_refused(text, data, cache, tmp_path):
    little.refused(job(data, tmp_path / "run", cache, f"--time-limit={text}"), 2, "--time-limit")


@posix
def test_time_limit_exits_with_75_and_can_resume(data, cache, tmp_path):
    more = ("--epochs", "40", "--until", "student")
    assert job(data, tmp_path / "run", cache, "--until", "prepare", "--epochs", "40").exit_code == 0

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(task: DistillationTask) -> Any:
            time.sleep(0.05)
            return real(task)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTask, "end_step", slowly(DistillationTask.end_step))
        stopped = job(data, tmp_path / "run", cache, *more, "--time-limit", "4s")
    assert stopped.exit_code == TIME_LIMIT_EXIT, stopped.output
    assert "Stopped at --time-limit" in stopped.stderr and "Traceback" not in stopped.stderr
    assert (tmp_path / "run" / "checkpoint" / "student.pt").exists()
    assert job(data, tmp_path / "run", cache, *more).exit_code == 0
    assert job(data, tmp_path / "whole", cache, *more).exit_code == 0
    resumed, whole = (weights(tmp_path / name / "student.safetensors") for name in ("run", "whole"))
    assert resumed == whole
    curves = [[e["losses"] for e in report(tmp_path / name)["epochs"]] for name in ("run", "whole")]
    assert curves[0] == curves[1] and len(curves[0]) == 42


@posix
def test_time_limit_ends_a_stage_without_steps_too(finished, data, cache, tmp_path, monkeypatch):
    real = stages.load_stage

    def waiting(name: str) -> Callable[[Any], Any]:
        return real(name) if name != "prepare" else lambda *_: subprocess.run(["sleep", "60"])

    monkeypatch.setattr(stages, "load_stage", waiting)
    assert job(data, tmp_path / "run", cache, "--until", "teacher").exit_code == 0
    begun = time.monotonic()
    stopped = job(data, tmp_path / "run", cache, "--time-limit", "2s")
    assert stopped.exit_code == TIME_LIMIT_EXIT and time.monotonic() - begun < 30
    monkeypatch.undo()
    assert job(data, tmp_path / "run", cache, "--until", "student").exit_code == 0
    assert weights(tmp_path / "run" / "student.safetensors") == weights(finished / "student.safetensors")


def test_partial_files_are_removed(a_run, data, cache):
    (a_run / f".student.safetensors.{os.getpid()}.part").write_bytes(b"half")
    (a_run / "checkpoint").mkdir(exist_ok=True)
    (a_run / "checkpoint" / ".student.pt.1.part").write_bytes(b"half")
    assert job(data, a_run, cache).exit_code == 0
    assert sorted(path.name for path in a_run.rglob(".*")) == [".lock", ".run.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_loading_a_command_prints_one_line(number):
    code = (
        "import os, sys\n"
        "from questpress.pipeline.cli import main as cli\n"
        f"cli.import_module = lambda *_: os.kill(os.getpid(), {int(number)})\n"
        "cli.cli(['doctor'])"
    )
    stopped = little.python(code)
    assert stopped.returncode == 130 and stopped.stderr.strip() == "Stopped."
