"""On what a training is computed: chosen once, recorded, and changed by the user alone."""

from types import SimpleNamespace

import pytest
from questpress.pipeline.runs.device import Engine, free_memory
from questpress.pipeline.runs.record import RunRecord
from questpress.pipeline.training.trainer import engine


class Run:
    """What ``engine`` needs of a job, with a choice that tells itself apart from what is recorded."""

    def __init__(
        self, precision: str = "auto", key: str = "key", record: RunRecord | None = None
    ) -> None:
        self.notes: list[str] = []
        self.options = SimpleNamespace(precision=precision)
        self.key, self.device = key, "cpu"
        self.folder = SimpleNamespace(record=RunRecord() if record is None else record, save=lambda: None)
        self.display = SimpleNamespace(note=self.notes.append)

    def engine(self, threads: int = 4) -> Engine:
        return engine(
            self,  # type: ignore[arg-type]
            "student",
            lambda asked: Engine("cpu", threads, "bf16" if asked == "auto" else asked),
        )


def test_a_training_goes_on_with_the_engine_it_was_begun_with() -> None:
    first = Run()
    assert first.engine(threads=4) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record).engine(threads=8) == Engine("cpu", 4, "bf16")
    assert Run(record=first.folder.record, key="another").engine(threads=8).threads == 8


def test_a_precision_that_is_asked_for_wins_over_the_recorded_one_and_is_told() -> None:
    first = Run()
    first.engine()
    asked = Run("fp32", record=first.folder.record)
    assert asked.engine().precision == "fp32"
    assert asked.notes == ["student was begun in bf16 and goes on in fp32"]
    assert Run(record=first.folder.record).engine().precision == "fp32"


def test_a_gpu_has_a_limit_of_memory_and_the_host_has_none_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8e9, 16e9))
    assert free_memory("cuda:0") == 8e9
    assert free_memory("cpu") == free_memory("mps") == float("inf")
