"""On what a training is computed: chosen once, recorded, and changed by the user alone."""

from types import SimpleNamespace

import pytest
from questpress.pipeline.runs.device import Engine, free_memory
from questpress.pipeline.runs.record import RunRecord
from questpress.pipeline.training.trainer import choose_run_engine


class Run:
    """The part of a context that ``choose_run_engine`` needs."""

    def __init__(self, precision: str = "auto", key: str = "key", record: RunRecord | None = None) -> None:
        self.notes: list[str] = []
        self.options = SimpleNamespace(precision=precision)
        self.key, self.device = key, "cpu"
        self.folder = SimpleNamespace(record=RunRecord() if record is None else record, save=lambda: None)
        self.display = SimpleNamespace(note=self.notes.append)

    def engine(self, threads: int = 4) -> Engine:
        return choose_run_engine(
            self,  # type: ignore[arg-type]
            "student",
            lambda asked: Engine("cpu", threads, "bf16" if asked == "auto" else asked),
        )


def test_resumed_training_keeps_its_engine() -> None:
    first = Run()
    assert first.engine(threads=4) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record).engine(threads=8) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record, key="another").engine(threads=8).threads == 8


def test_requested_precision_overrides_the_recorded_one() -> None:
    first = Run()
    first.engine()
    asked = Run("fp32", record=first.folder.record)
    assert asked.engine().precision == "fp32"
    assert asked.notes == ["student was started in bf16 and resumes in fp32"]
    assert Run(record=first.folder.record).engine().precision == "fp32"


def test_gpu_has_a_memory_limit_and_the_host_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8e9, 16e9))
    assert free_memory("cuda:0") == 8e9
    assert free_memory("cpu") == free_memory("mps") == float("inf")
