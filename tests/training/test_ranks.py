"""Training with several processes equals that with one: results, logs, stopping and resuming."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from questpress.models.build import geometry
from questpress.models.readout import widen
from questpress.pipeline.data.render import Normalize, Views
from questpress.pipeline.data.views import ViewSchedule
from questpress.pipeline.evaluation.predictions import compute_logits
from questpress.pipeline.methods.base import Method, Setup, Shapes
from questpress.pipeline.methods.kd import Kd
from questpress.pipeline.methods.kd import Parameters as KdParameters
from questpress.pipeline.methods.mimic.mimic import Mimic
from questpress.pipeline.methods.mimic.mimic import Parameters as MimicParameters
from questpress.pipeline.methods.quest.quest import Parameters, Quest
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.process import STOP
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.training import loop
from questpress.pipeline.training.distributed import Ranks, join, leave
from questpress.pipeline.training.loop import train
from questpress.pipeline.training.task import DistillationTask, Teacher
from questpress.pipeline.training.teacher_cache import TeacherCache, TeacherSource
from questpress.pipeline.training.weights import Checkpoint
from torch import Tensor, nn

from tests.support import little, several
from tests.support.little import files, record, report, weights
from tests.support.toys import CLASSES, CLASSIFICATION, ENGINE, SIDE, network, plan, views

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

SHAPES = Shapes({"map": (64, SIDE // 4, SIDE // 4)}, vector=64, logits=CLASSES)
TEACHER_READS = {"kd": frozenset({"logits"}), "quest": frozenset({"map"}), "mimic": frozenset({"vector"})}


def without_batch_norm(net: nn.Module) -> nn.Module:
    """Replace BatchNorm, whose statistics depend on the rank, by GroupNorm."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return net


def build_method(name: str) -> Method:
    torch.manual_seed(0)
    if name == "kd":
        return Kd(KdParameters(), Setup(SHAPES, [SHAPES], {}))
    if name == "mimic":
        hashes = {"0.weight": torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) / 8}
        # The mean over the images that a teacher is right on is each rank's own, so it is taken over all.
        mimicked = MimicParameters(variant="lshl2", alone=1)
        return Mimic(mimicked, Setup(SHAPES, [SHAPES], {**hashes, "0.bias": torch.zeros(40)}))
    words = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    prepared = {"0.map.words": words, "0.map.mu": torch.tensor(10.0), "0.map.top": torch.tensor(3)}
    return Quest(Parameters(words=5), Setup(SHAPES, [SHAPES], prepared))


def build_cache(method: Method, given: Views, teacher: Teacher, cache: Path, ranks: Ranks) -> TeacherCache:
    def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, _ in given.batches(plan))

    source = TeacherSource("teacher", "images", {"t": 0}, method.cached_outputs(0), lambda: teacher)
    return TeacherCache(Cache(cache), [source], len(given), render, lambda *_: None, ranks)


CASES: dict[str, dict[str, Any]] = {
    "quest": {"method": "quest"},
    "kd": {"method": "kd"},
    "quest from the store": {"method": "quest", "store": True},
    "balanced": {"method": "kd", "balance": True, "weights": {"kd": 5.0}},
    "in parts": {"method": "quest", "micro_batch": 3},
    "unlabeled from the store": {"method": "quest", "store": True, "unlabeled": 6, "micro_batch": 4},
    "with a running mean": {"method": "kd", "ema": 0.9},
    "with a layer for another width": {"method": "mimic", "widened": 64},
    "with batch norm": {"method": "kd", "frozen": False},
}


def train_twenty_steps(case: str, folder: Path, ranks: Ranks, stop_after: int | None = None) -> None:
    """Train two epochs of ten steps; rank 0 saves the results."""
    o = CASES[case]
    name = o["method"]
    method = build_method(name)
    g = geometry("cifar_resnet8", SIDE)
    teacher = Teacher(network(seed=7), g, ENGINE)
    student = without_batch_norm(network()) if o.get("frozen", True) else network()
    if "widened" in o:
        widen(student, o["widened"], seed=0)
    task = DistillationTask(
        student, g, ENGINE, teachers=[] if o.get("store") else [teacher],
        teacher_reads=[] if o.get("store") else [TEACHER_READS[name]], methods={name: method},
        student_reads=TEACHER_READS[name], weights=o.get("weights"), balance=o.get("balance", False),
        ema=o.get("ema"), ranks=ranks, label_task=CLASSIFICATION,
    )  # fmt: skip
    if ranks.count > 1:
        task.prepare_distributed()
    seen, views_of = views(170), ViewSchedule(views().policy, 0, 2 if o.get("store") else None)
    given = views(94, labeled=83) if "unlabeled" in o else views(83)
    store = build_cache(method, given, teacher, folder / "cache", ranks) if o.get("store") else None
    pixels = seen.batch(torch.arange(131), torch.zeros(131, dtype=torch.int64))[0].permute(0, 2, 3, 1)
    outputs: list[Tensor] = []

    def measured(net: nn.Module) -> float:
        mine = compute_logits(net, Normalize(g.mean, g.std), pixels[ranks.part(131)], ENGINE)
        outputs.append(ranks.gather(mine))
        return CLASSIFICATION.percent(outputs[-1].numpy(), seen.labels[:131].numpy())

    if stop_after is not None:
        count_down(task, stop_after if ranks.rank == ranks.count - 1 else None)
    epochs: list[Epoch] = []
    train(
        task, given, plan(epochs=2, optimizer="sgd", lr=0.005,
                          **{key: o[key] for key in ("micro_batch", "unlabeled") if key in o}),
        Checkpoint(folder / f"{case}.pt", "key"), training="student", evaluate=measured, show=lambda *_: None,
        log=epochs.append, schedule=views_of, cache=store, ranks=ranks,
    )  # fmt: skip
    if ranks.is_main:
        outcome = {
            "weights": {**dict(task.student.named_parameters()), **dict(task.student.named_buffers())},
            "shipped": task.shipped.state_dict(),
            "outputs": torch.stack(outputs),
            "epochs": [
                {**e.losses, **e.metrics, "train": e.train_accuracy, "val": e.val_accuracy} for e in epochs
            ],
        }
        torch.save(outcome, folder / f"{case}.{ranks.count}.outcome")


def count_down(task: DistillationTask, steps: int | None) -> None:
    """Request this process to stop after a number of steps."""
    loop.AGREE_SECONDS = 0.0
    real, done = task.end_step, [0]

    def end_step() -> None:
        real()
        done[0] += 1
        if done[0] == steps:
            STOP.requested = KeyboardInterrupt

    task.end_step = end_step  # type: ignore[method-assign]


def train_all_cases(folder: Path) -> None:
    ranks = join()
    for case in CASES:
        train_twenty_steps(case, folder, ranks)
    for count in (1, 2):
        stopped = folder / f"stopped{count}"
        stopped.mkdir(exist_ok=True)
        try:
            train_twenty_steps("quest", stopped, ranks, stop_after=13)
        except KeyboardInterrupt:
            assert torch.load(stopped / "quest.pt")["step"] == 3 if ranks.is_main else True
        else:
            raise AssertionError("no process stopped")
    train_twenty_steps("quest", folder / "stopped2", ranks)
    leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for case in CASES.keys() - {"with batch norm"}:
        train_twenty_steps(case, folder, Ranks())
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of two processes in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    started = several.start(folder, train_all_cases, folder)
    assert started.codes() == [0, 0], started.output(0) + started.output(1)
    return folder


def outcome(folder: Path, case: str, count: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{case}.{count}.outcome", weights_only=True)
    return loaded


# KD's gradients between two networks that hardly differ are small differences of large numbers. Their size,
# which the balance sums the logarithms of, is rounded in the fourth figure on some processors.
TOLERANCE = {"balanced": (1e-4, 1e-3)}


def assert_close(first: dict[str, Any], second: dict[str, Any], atol: float = 1e-5, rtol: float = 0) -> None:
    for part in ("weights", "shipped"):
        assert first[part].keys() == second[part].keys()
        for name, x in first[part].items():
            torch.testing.assert_close(
                x, second[part][name], atol=atol, rtol=rtol, msg=lambda m, at=f"{part} {name}": f"{at}: {m}"
            )
    torch.testing.assert_close(first["outputs"], second["outputs"], atol=10 * atol, rtol=rtol)
    for a, b in zip(first["epochs"], second["epochs"], strict=True):
        assert a == pytest.approx(b, abs=atol, rel=rtol)


@pytest.mark.parametrize("case", [case for case in CASES if case != "with batch norm"])
def test_two_processes_equal_one_after_twenty_steps(trained: Path, alone: Path, case: str) -> None:
    distributed = outcome(trained, case, 2)
    assert_close(outcome(alone, case, 1), distributed, *TOLERANCE.get(case, ()))
    assert distributed["outputs"].shape[1] == 131  # every image once, though 131 is odd


def test_cached_outputs_are_independent_of_the_number_of_processes(trained: Path, alone: Path) -> None:
    def arrays(root: Path) -> dict[str, bytes]:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("cache/**/*.npy")}

    assert arrays(trained) == arrays(alone) and len(arrays(trained)) == 2 * 6
    assert not list((trained / "cache").rglob("*.part"))


def test_evaluated_network_is_the_shipped_one(trained: Path) -> None:
    """Ranks have to average their BatchNorm statistics before they evaluate."""
    results = outcome(trained, "with batch norm", 2)
    net = network()
    net.load_state_dict(results["shipped"])
    g = geometry("cifar_resnet8", SIDE)
    seen = views(170)
    pixels = seen.batch(torch.arange(131), torch.zeros(131, dtype=torch.int64))[0].permute(0, 2, 3, 1)
    expected = compute_logits(net, Normalize(g.mean, g.std), pixels, ENGINE)
    torch.testing.assert_close(results["outputs"][-1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_stop_of_one_process_stops_all_and_resumes(trained: Path, alone: Path, count: int) -> None:
    folder = trained / f"stopped{count}"
    if count == 1:
        train_twenty_steps("quest", folder, Ranks())
    resumed, whole = outcome(folder, "quest", count), outcome(alone, "quest", 1)
    # The epoch that was broken off and the sums it had are whole again.
    assert len(resumed["epochs"]) == 1
    whole["epochs"], whole["outputs"] = whole["epochs"][1:], whole["outputs"][1:]
    assert_close(resumed, whole)


# The command.


def arguments(data: Path, out: Path, cache: Path, *more: str) -> list[str]:
    return little.little_command(data, out, cache, *more)[3:]


def fields(content: Any) -> Any:
    """Return the keys of a report without its values; which latencies are reported depends on the load."""
    if isinstance(content, dict):
        return {
            name: None if name in ("latency_ms", "speedups") else fields(value)
            for name, value in content.items()
        }
    return [fields(content[0])] if isinstance(content, list) and content else None


def test_whole_command_with_two_processes(finished, data, cache, tmp_path):
    out = tmp_path / "run"
    first = several.start(tmp_path / "first", several.command, *arguments(data, out, cache))
    assert first.codes() == [0, 0], first.output(0) + first.output(1)
    assert first.output(1) == ""
    lines = [line for line in first.output(0).splitlines() if line.strip()]
    assert len(lines) == len(set(lines)) and sum("✓" in line for line in lines) == 8
    assert files(out).keys() == files(finished).keys()
    # What differs by name is what was found in this run alone: warnings, notes.
    actual, expected = fields(report(out)), fields(report(finished))
    for name in ("teachers", "teacher", "student", "student_int8", "data", "epochs", "words", "stages"):
        assert actual[name] == expected[name], name
    assert len(report(out)["epochs"]) == len(report(finished)["epochs"]) == 4
    assert report(out)["teacher"]["score"]["n"] == report(finished)["teacher"]["score"]["n"]

    before = {name: weights(out / name) for name in ("teacher.safetensors", "student.safetensors")}
    again = several.start(tmp_path / "again", several.command, *arguments(data, out, cache))
    assert again.codes() == [0, 0] and again.output(1) == ""
    assert again.output(0).count("(kept)") == 8
    assert {name: weights(out / name) for name in before} == before


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--batch-size", "15"), "must be a multiple of 2 processes"), (("--nonsense",), "No such option")],
)
def test_usage_error_is_printed_once(data, cache, tmp_path, more, words):
    started = several.start(
        tmp_path / "output", several.command, *arguments(data, tmp_path / "run", cache, *more)
    )
    assert started.codes() == [2, 2]
    output = started.output(0) + started.output(1)
    assert output.count("Error: ") == 1 and words in output and "Traceback" not in output


def one_fails(*options: str) -> None:
    """Run the command; the second process runs out of memory in its first step."""
    if os.environ["RANK"] == "1":

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no memory")

        loop.backward = full
    several.command(*options)


def test_error_of_one_process_is_printed_once(data, cache, tmp_path):
    started = several.start(tmp_path / "output", one_fails, *arguments(data, tmp_path / "run", cache))
    assert started.codes() == [1, 1]
    output = started.output(0) + started.output(1)
    assert "Traceback" not in output and output.count("Error: ") == 1
    assert "Rank 1: not enough memory on cpu for 8 images of a step. Use --micro-batch 4" in output


def test_stopped_torchrun_resumes_in_one_process(data, cache, tmp_path):
    more = ("--epochs", "60", "--cache-views", "2", "--until", "student")
    out = tmp_path / "run"
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
            *little.little_command(data, out, cache, *more),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=little.one_core, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    little.wait_for(lambda: any('"stage":"student"' in line for line in curve(out)), launcher)
    launcher.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert stderr.count("Stopped. Run the same command again to resume") == 1, stderr
    assert "✓ student" not in stderr and "Error: " not in stderr
    stopped = len(curve(out))
    assert (out / "checkpoint" / "student.pt").exists() and 2 < stopped < 62
    little.check_success(little.job(data, out, cache, *more))
    assert "student" in record(out)["stages"] and len(curve(out)) == 62
    assert [json.loads(line)["epoch"] for line in curve(out)] == [1, 2, *range(1, 61)]


def curve(out: Path) -> list[str]:
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []
