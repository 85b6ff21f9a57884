"""The engine of a training: chosen once, recorded, and changed only by the user."""

import os
from types import SimpleNamespace

import pytest
import torch
from questpress.export import runtime
from questpress.models.build import build
from questpress.pipeline.errors import JobError, UsageError
from questpress.pipeline.runs import device
from questpress.pipeline.runs.device import Engine, free_memory
from questpress.pipeline.runs.record import RunRecord
from questpress.pipeline.training.trainer import choose_run_engine


class Run:
    """The part of a context that ``choose_run_engine`` needs."""

    def __init__(
        self,
        precision: str = "auto",
        key: str = "key",
        record: RunRecord | None = None,
        threads: int | None = None,
    ) -> None:
        self.notes: list[str] = []
        self.options = SimpleNamespace(precision=precision, threads=threads)
        self.key, self.device = key, "cpu"
        self.folder = SimpleNamespace(record=RunRecord() if record is None else record, save=lambda: None)
        self.display = SimpleNamespace(note=self.notes.append)

    def engine(self, threads: int = 4) -> Engine:
        return choose_run_engine(
            self,  # type: ignore[arg-type]
            "student",
            lambda precision: Engine("cpu", threads, "bf16" if precision == "auto" else precision),
        )


def test_resumed_training_keeps_its_engine() -> None:
    first = Run()
    assert first.engine(threads=4) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record).engine(threads=8) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record, key="another").engine(threads=8).threads == 8


def test_requested_threads_override_the_recorded_ones() -> None:
    first = Run()
    first.engine(threads=4)
    run = Run(record=first.folder.record, threads=2)
    assert run.engine() == Engine("cpu", 2, "bf16")
    assert run.notes == ["student was started with 4 threads and resumes with 2"]
    assert run.folder.record.engines["student"].threads == 2


def test_fixed_threads_apply_to_torch_and_to_sessions() -> None:
    before = torch.get_num_threads(), device.threads(), runtime.default_threads()
    with device.fix_threads(3):
        assert (torch.get_num_threads(), device.threads(), runtime.default_threads()) == (3, 3, 3)
        assert device.choose_engine("cpu", "fp32", torch.nn.Identity()).threads == 3
    assert (torch.get_num_threads(), device.threads(), runtime.default_threads()) == before
    with device.fix_threads(None):
        assert (device.threads(), runtime.default_threads()) == before[1:]


def test_deterministic_operations_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = torch.are_deterministic_algorithms_enabled, lambda: torch.backends.cudnn.deterministic
    before = [flag() for flag in flags]
    message = r"^--deterministic: put_ has no deterministic form on this device\."
    with pytest.raises(JobError, match=message), device.select_kernels(True):
        assert all(flag() for flag in flags)
        assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
    assert [flag() for flag in flags] == before
    with device.select_kernels(False):
        assert torch.backends.cudnn.benchmark
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


def test_requested_precision_overrides_the_recorded_one() -> None:
    first = Run()
    first.engine()
    run = Run("fp32", record=first.folder.record)
    assert run.engine().precision == "fp32"
    assert run.notes == ["student was started in bf16 and resumes in fp32"]
    assert Run(record=first.folder.record).engine().precision == "fp32"


def test_gpu_has_a_memory_limit_and_the_host_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8e9, 16e9))
    assert free_memory("cuda:0") == 8e9
    assert free_memory("cpu") == free_memory("mps") == float("inf")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert device.choose_device(None, 1) == "cuda:1"
    with pytest.raises(UsageError, match="got 2 with 2 GPUs"):
        device.choose_device("cuda", 2)
    assert used == [1]


@pytest.mark.parametrize(
    ("bf16", "capability", "precision"),
    [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (7, 0), "fp16"), (False, (6, 1), "fp32")],
)
def test_precision_fits_the_gpu(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    network = build("mobilenetv2_050", num_classes=2, image_size=32)
    assert device.choose_engine("cuda:1", "auto", network) == Engine("cuda:1", device.threads(), precision)
    assert device.inference_engine("cuda:1", "auto").precision == precision
    assert device.choose_engine("cuda:1", "fp32", network).precision == "fp32"


def test_networks_that_bf16_does_not_fit_are_trained_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "bf16_pays", lambda _: True)
    precisions = {
        (size, precision): device.choose_engine("cpu", precision, network).precision
        for size in (16, 32)
        for network in [build("resnet18", num_classes=2, image_size=size)]
        for precision in ("auto", "bf16")
    }
    assert precisions == {
        (16, "auto"): "fp32",
        (16, "bf16"): "bf16",
        (32, "auto"): "bf16",
        (32, "bf16"): "bf16",
    }
