"""Gradients of micro-batches, and their size when memory is insufficient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from questpress.pipeline.errors import JobError
from questpress.pipeline.methods.base import Setup
from questpress.pipeline.runs.record import RunRecord
from questpress.pipeline.training import loop
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.loop import Batch, backward
from questpress.pipeline.training.metrics import Meter
from questpress.pipeline.training.optimizer import build_scaler
from questpress.pipeline.training.task import DistillationTask
from questpress.pipeline.training.trainer import MicroBatch

from tests.support import little
from tests.support.little import job, record, weights
from tests.support.toys import distillation, plan, views
from tests.training.test_ranks import SHAPES, TEACHER_READS, Kd, KdParameters, without_batch_norm


def batch(size: int, labeled: int | None = None) -> Batch:
    given = views(size, labeled=labeled)
    pixels, labels = given.batch(torch.arange(size), torch.zeros(size, dtype=torch.int64))
    return Batch(pixels, labels, given.keys, None)


def kd(**changes: Any) -> DistillationTask:
    task = distillation(
        teacher_reads=[TEACHER_READS["kd"]],
        methods={"kd": Kd(KdParameters(), Setup(SHAPES, [SHAPES], {}))},
        student_reads=TEACHER_READS["kd"],
        **changes,
    )
    without_batch_norm(task.network)
    return task


def quest(**changes: Any) -> DistillationTask:
    task = distillation(**changes)
    without_batch_norm(task.network)
    return task


def gradients(task: DistillationTask, given: Batch, size: int | None) -> tuple[dict[str, Any], Meter]:
    meter = Meter(task.device, Ranks(), task.label_task)
    task.train()
    backward(task, given, size, meter, build_scaler(task))
    return {
        name: parameter.grad
        for name, parameter in task.student.named_parameters()
        if parameter.grad is not None
    }, meter


@pytest.mark.parametrize("make", [quest, kd])
@pytest.mark.parametrize(("size", "labeled"), [(2, None), (3, None), (4, None), (7, None), (3, 11), (4, 2)])
def test_micro_batches_have_the_gradients_and_losses_of_the_batch(
    make: Any, size: int, labeled: int | None
) -> None:
    given, tasks = batch(16, labeled), [make(), make()]
    for task in tasks:
        task.student.labeled_fraction = len(given.labels) / 16
    whole, at_once = gradients(tasks[0], given, None)
    parts, summed = gradients(tasks[1], given, size)
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    # A divergence near 0 is a difference of large sums: what is left of them is rounded as they are.
    assert summed.means(0) == pytest.approx(at_once.means(0), rel=1e-6, abs=1e-6)
    assert summed.accuracy() == at_once.accuracy()


@pytest.mark.parametrize(
    ("images", "size", "parts"),
    [(16, None, [16]), (16, 16, [16]), (16, 4, [4] * 4), (16, 5, [4] * 4), (10, 4, [3, 3, 4]),
     (9, 4, [3, 3, 3]), (3, 2, [3]), (5, 2, [2, 3]), (2, 2, [2])],
)  # fmt: skip
def test_micro_batches_are_even_and_have_at_least_two_images(
    images: int, size: int | None, parts: list[int]
) -> None:
    batches = list(batch(images).split(size))
    assert [len(part) for part in batches] == parts
    assert torch.equal(torch.cat([part.keys for part in batches]), batch(images).keys)


@pytest.mark.parametrize(
    ("labeled", "size", "counts"),
    [(5, 2, [0, 1, 0, 1, 1, 0, 1, 1]), (2, 4, [0, 1, 0, 1]), (15, 6, [4, 5, 6])],
)
def test_labeled_images_are_the_first_of_their_micro_batches(labeled: int, size: int, counts: Any) -> None:
    given = batch(16, labeled)
    parts = list(given.split(size))
    assert [len(part.labels) for part in parts] == counts and max(map(len, parts)) <= size
    assert torch.equal(torch.cat([part.labels for part in parts]), given.labels)
    keys = [part.keys.split([n, len(part) - n]) for n, part in zip(counts, parts, strict=True)]
    assert torch.equal(torch.cat([torch.cat(some) for some in zip(*keys, strict=True)]), given.keys)


def test_gradient_ratio_of_micro_batches_is_that_of_the_batch() -> None:
    given, tasks = batch(16), [kd(balance=True, weights={"kd": 20.0}) for _ in range(2)]
    for task, size in zip(tasks, (None, 4), strict=True):
        gradients(task, given, size)
        task.end_step()
    whole, parts = (task.balanced_weights()[0] for task in tasks)
    assert tasks[1].student.balance is not None and tasks[1].student.balance.steps == 1
    assert parts.ratio == pytest.approx(whole.ratio, rel=1e-4)


# Memory that runs out.


def limit_memory(max_images: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Limit the images that fit into memory; return the sizes of the batches that were run."""
    sizes: list[int] = []
    real = DistillationTask.forward

    def forward(task: DistillationTask, input: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(input))
        if len(input) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(task, input, *rest)

    monkeypatch.setattr(DistillationTask, "forward", forward)
    return sizes


UNTIL = ("--until", "student", "--cache-views", "2")


def test_insufficient_memory_halves_micro_batches_and_changes_no_weight(data, cache, tmp_path, monkeypatch):
    little.check_success(job(data, tmp_path / "reference", cache, *UNTIL, "--micro-batch", "4"))
    sizes = limit_memory(4, monkeypatch)
    result = little.check_success(job(data, tmp_path / "halved", tmp_path / "cache", *UNTIL))
    assert sizes[:3] == [16, 8, 4] and sizes.count(16) == sizes.count(8) == 2 and set(sizes) == {16, 8, 4}
    warned = [line for line in result.stderr.splitlines() if "not enough memory for" in line]
    assert len(warned) == 4 and ["micro-batches of 8" in line for line in warned] == [True, False] * 2
    assert {name: entry["size"] for name, entry in record(tmp_path / "halved")["micro_batches"].items()} == {
        "teacher": 4, "student": 4,
    }  # fmt: skip
    for name in ("teacher.safetensors", "student.safetensors"):
        assert weights(tmp_path / "halved" / name) == weights(tmp_path / "reference" / name)


def test_resumed_run_keeps_its_micro_batch(data, cache, tmp_path, monkeypatch):
    assert job(data, tmp_path / "run", cache, "--until", "prepare").exit_code == 0
    sizes = limit_memory(8, monkeypatch)
    real, epochs = loop.Meter.means, [0]

    def interrupted(meter: loop.Meter, epoch: int, **more: Any) -> Any:
        epochs[0] += bool(more)
        if epochs[0] == 2:
            raise KeyboardInterrupt
        return real(meter, epoch, **more)

    monkeypatch.setattr(loop.Meter, "means", interrupted)
    assert job(data, tmp_path / "run", cache, *UNTIL).exit_code == 130
    assert sizes[:2] == [16, 8] and sizes.count(16) == 1
    monkeypatch.setattr(loop.Meter, "means", real)
    sizes.clear()
    resumed = job(data, tmp_path / "run", cache, *UNTIL)
    assert resumed.exit_code == 0 and "not enough memory" not in resumed.stderr
    assert set(sizes) == {8}
    sizes.clear()
    fresh = job(data, tmp_path / "run", cache, *UNTIL, "--fresh")
    assert fresh.exit_code == 0 and sizes[0] == 16


def test_out_of_memory_at_the_smallest_micro_batch_is_reported(data, cache, tmp_path, monkeypatch):
    limit_memory(1, monkeypatch)
    result = job(data, tmp_path / "run", cache, *UNTIL)
    little.refused(result, 1, "Not enough memory on cpu for 2 images", "smaller network")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_errors_of_every_library_are_recognized(error: Exception) -> None:
    context: Any = SimpleNamespace(
        ranks=Ranks(), key="key", device="cpu", display=SimpleNamespace(warn=lambda _: None),
        folder=SimpleNamespace(record=RunRecord(), save=lambda: None),
    )  # fmt: skip
    sizes: list[int | None] = []

    def train(size: int | None) -> None:
        sizes.append(size)
        if len(sizes) < 3:
            raise error

    MicroBatch(context, "student", plan(batch_size=16)).run(train)
    assert sizes == [None, 8, 4] and context.folder.record.micro_batches["student"].size == 4
    with pytest.raises(ValueError, match="another"):
        MicroBatch(context, "student", plan()).run(lambda _: (_ for _ in ()).throw(ValueError("another")))
    sizes.clear()
    with pytest.raises(JobError, match="Not enough memory on cpu for 3 images"):  # 2, 2, 2 and 3 again
        MicroBatch(context, "qat", plan(batch_size=5, unlabeled=4)).run(train)
    assert sizes == [None, 4]
    context.ranks, sizes = Ranks(1, 2), []
    with pytest.raises(JobError, match="Rank 1: not enough memory on cpu for 4 images"):
        MicroBatch(context, "student", plan(batch_size=16)).run(train)
