"""Fixtures of all tests.

Toy networks are slower on many threads than on one, and several test runs share a machine.
"""

import functools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
os.environ.pop("COLUMNS", None)  # set by pytest-xdist

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.support import little

# The exporter builds its registry of operators again for each file, which takes a third of the time.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore

# A shell has its background jobs ignore Ctrl-C, and so would every process that a test starts there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def machine() -> Iterator[None]:
    """Report wall time on a busy machine too, which test_disturbed.py tests, and do not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("questpress.export.latency.noise.MAX_TAKEN", float("inf"))
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Little networks on one thread, so that a busy machine does not slow them down."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("runs.device", "stages.bench", "api.run"):
            patch.setattr(f"questpress.pipeline.{module}.allowed_cores", lambda: 1)
        torch.set_num_threads(1)
        # Two processes more for each run; test_int8_in_a_run.py has them.
        patch.setattr("questpress.pipeline.stages.quantize._measure_latency", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def cache(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """Three classes of twenty little pictures."""
    return little.photos(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, cache: Path) -> Path:
    """The run folder of a whole little job. Tests must not change it: ``a_run`` is a copy to change."""
    out = tmp_path_factory.mktemp("runs") / "colors"
    result = little.check_success(little.job(data, out, cache))
    (out.parent / "stderr.txt").write_text(result.stderr)
    (out.parent / "stdout.txt").write_text(result.stdout)
    return out


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folder of the built-in digits with little networks, timed on two threads as well."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("questpress.pipeline.stages.bench.allowed_cores", lambda: 2)
        result = little.compress(
            *little.NETWORKS, "--image-size", "16", "--teacher-epochs", "3", "--epochs", "2",
            "--batch-size", "32", "--bench-seconds", "0.2", "--set", "quest.words=64", "--out", out,
            "--cache", cache, "--calibration", "minmax", "--calibration-images", "32",
        )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    (out.parent / "stderr.txt").write_text(result.stderr)
    return out
