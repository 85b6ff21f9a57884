"""The search for the fastest engine: its choice, its time, and that it changes no state."""

from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from questpress.pipeline.runs.device import Engine, cores
from questpress.pipeline.runs.record import EngineEntry, RunRecord
from questpress.pipeline.training import engine_search, trainer
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.engine_search import Trial, find_fastest_engine
from questpress.pipeline.training.loop import Batch
from questpress.pipeline.training.optimizer import build_optimizer
from questpress.pipeline.training.task import DistillationTask

from tests.training.test_step import BATCH, batch, distillation, plan

RULE = Engine("cpu", 1, "fp32")
LONG = 100_000


def optimizer(task: DistillationTask) -> torch.optim.Optimizer:
    return build_optimizer(task, plan())


@pytest.fixture
def task() -> DistillationTask:
    return distillation("quest+kd", RULE)


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_search, "bf16_pays", lambda _: True)
    monkeypatch.setattr(engine_search, "cores", lambda: 1)


Timer = Callable[[Callable[[Engine], float]], list[Engine]]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, bf16: None) -> Timer:  # noqa: ARG001
    """Step times set by the test; records the engines that were timed, in order."""

    def install(seconds: Callable[[Engine], float]) -> list[Engine]:
        tried: list[Engine] = []

        def step(_self: Any, engine: Engine) -> float:
            if engine not in tried:
                tried.append(engine)
            return seconds(engine)

        monkeypatch.setattr(engine_search._StepTimer, "step", step)
        return tried

    return install


def run(task: DistillationTask, steps: int = LONG, **changes: Any) -> tuple[Trial, list[str]]:
    notes: list[str] = []
    options: dict[str, Any] = {"precision": "auto", "compile": "off", "note": notes.append}
    return find_fastest_engine(task, batch(), optimizer, steps, **{**options, **changes}), notes


def test_clearly_faster_engine_is_chosen_and_noted(task: DistillationTask, timed: Timer) -> None:
    tried = timed(
        lambda e: 0.1 * (0.5 if e.precision == "bf16" else 1) * (2 if e.layout == "contiguous" else 1)
    )
    trial, _ = run(task)
    fast = replace(RULE, precision="bf16")
    assert trial.engine == fast
    assert tried == [RULE, fast, replace(fast, layout="contiguous")]
    assert trial.throughput == {RULE: BATCH / 0.1, fast: BATCH / 0.05, tried[2]: BATCH / 0.1}
    assert str(trial) == (
        "bf16, channels last, 1 thread: 160 images/s; fp32, channels last, 1 thread: 80 images/s; "
        "bf16, contiguous, 1 thread: 80 images/s"
    )


def test_small_gain_changes_nothing(task: DistillationTask, timed: Timer) -> None:
    timed(lambda e: 0.1 if e == RULE else 0.097)
    assert run(task)[0].engine == RULE


@pytest.mark.parametrize("steps", [1, 100, 799])
def test_short_training_keeps_the_default_engine(task: DistillationTask, timed: Timer, steps: int) -> None:
    tried = timed(lambda e: 0.1 if e == RULE else 0.01)
    assert run(task, steps)[0] == Trial(RULE) and tried == []


def test_several_processes_use_the_default_engine(
    task: DistillationTask, timed: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = timed(lambda e: 0.1 if e == RULE else 0.01)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert run(task, compile="auto")[0] == Trial(RULE)
    assert run(task, compile="on")[0] == Trial(replace(RULE, compile="default"))
    assert tried == []


def test_search_takes_at_most_2_percent_of_the_training(task: DistillationTask, timed: Timer) -> None:
    spent = 0.0
    clock = SimpleNamespace(perf_counter=lambda: spent)

    def step(engine: Engine) -> float:
        nonlocal spent
        seconds = 0.1 if engine == RULE else 0.15
        spent += seconds
        return seconds

    timed(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_search, "time", clock)
        for steps in (800, 1600, 5000):
            spent = 0.0
            run(task, steps)
            assert spent <= 1.3 * 0.02 * 0.1 * steps


def test_hopeless_engine_is_dropped_after_one_step(task: DistillationTask, timed: Timer) -> None:
    calls = {"slow": 0}

    def step(engine: Engine) -> float:
        calls["slow"] += engine.precision == "bf16"
        return 10.0 if engine.precision == "bf16" else 0.1

    timed(step)
    assert run(task)[0].engine == RULE and calls["slow"] == 2


def test_precision_set_by_the_user_is_not_varied(task: DistillationTask, timed: Timer) -> None:
    tried = timed(lambda e: 0.01 if e.precision == "bf16" else 0.1)
    assert run(task, precision="fp32")[0].engine == RULE
    assert {engine.precision for engine in tried} == {"fp32"}


def test_bf16_is_not_tried_without_hardware_support(
    task: DistillationTask, timed: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = timed(lambda _: 0.1)
    monkeypatch.setattr(engine_search, "bf16_pays", lambda _: False)
    run(task)
    assert {engine.precision for engine in tried} == {"fp32"}


def test_one_thread_per_core_is_tried_with_hyper_threads(timed: Timer, monkeypatch: Any) -> None:
    rule = Engine("cpu", 4, "fp32")
    monkeypatch.setattr(engine_search, "cores", lambda: 2)
    timed(lambda e: 0.05 if e.threads == 2 else 0.1)
    trial, _ = run(distillation("none", rule))
    assert trial.engine.threads == 2 and "4 threads: " in str(trial)


def test_search_tries_one_thread_and_half_of_them(timed: Timer, monkeypatch: Any) -> None:
    rule = Engine("cpu", 4, "fp32")
    monkeypatch.setattr(engine_search, "cores", lambda: 4)
    tried = timed(lambda e: {4: 0.1, 2: 0.09, 1: 0.08}[e.threads])
    assert run(distillation("none", rule), precision="fp32")[0].engine == replace(rule, threads=1)
    assert [engine.threads for engine in tried if engine.layout == rule.layout] == [4, 2, 1]


@pytest.mark.parametrize(("steps", "busy", "threads"), [(199, 3, 4), (200, 3, 1), (200, 1.5, 4)])
def test_short_training_uses_one_thread_if_others_make_all_of_them_slow(
    timed: Timer, steps: int, busy: float, threads: int
) -> None:
    timed(lambda e: 0.1 * busy if e.threads > 1 else 0.1)
    assert run(distillation("none", Engine("cpu", 4, "fp32")), steps)[0].engine.threads == threads


@pytest.mark.parametrize(("graphs", "mode"), [(True, "reduce-overhead"), (False, "default")])
def test_cuda_graphs_are_not_chosen_with_micro_batches(graphs: bool, mode: str) -> None:
    seconds = {"off": 0.02, "default": 0.015, "reduce-overhead": 0.01}
    timer: Any = SimpleNamespace(
        task=SimpleNamespace(engine=Engine("cuda", 1, "bf16")),
        step=lambda engine: seconds[engine.compile],
        keep=lambda _: None,
    )
    best, timed = engine_search._search(timer, 10**6, [], "on", pytest.fail, graphs)
    assert best.compile == mode and {engine.compile for engine in timed} == {"off", mode}


def test_changed_threads_are_recorded_and_repeated() -> None:
    notes: list[str] = []
    job: Any = SimpleNamespace(
        folder=SimpleNamespace(record=RunRecord(), save=lambda: None), key="k", device="cpu",
        options=SimpleNamespace(precision="auto", threads=None), display=SimpleNamespace(note=notes.append),
        ranks=SimpleNamespace(count=1),
    )  # fmt: skip

    def start() -> Any:
        engine = trainer.choose_run_engine(job, "student", lambda _: Engine("cpu", 4, "fp32"))
        return trainer._build_tuner(job, "student", engine)

    start().use(2)
    tuner = start()
    assert (tuner.threads, tuner.most) == (2, 4)
    tuner.use(4)
    tuner = start()
    assert (tuner.threads, tuner.most) == (4, 4)
    assert [note.split(":")[0] for note in notes] == [
        "student continues with 2 threads", "student continues with 4 threads",
    ]  # fmt: skip
    job.options.threads = 4
    assert start().most == 1


@pytest.mark.usefixtures("bf16")
def test_search_changes_no_state(task: DistillationTask) -> None:
    def traces() -> dict[str, Any]:
        kept = {**dict(task.named_parameters()), **dict(task.named_buffers())}
        tensors = kept | {"rng": torch.get_rng_state()}
        strides = {name: value.stride() for name, value in kept.items()}
        flags = {name: module.training for name, module in task.named_modules()}
        return {
            "values": {name: value.clone() for name, value in tensors.items()},
            "rest": (strides, flags, task.engine, torch.get_num_threads(), task.metrics(),
                     [p.grad for p in task.parameters()], task.trainable_module.balance.steps),
        }  # fmt: skip

    before = traces()
    trial, notes = run(task)
    assert len(trial.throughput) == 3 and not notes
    after = traces()
    assert before["rest"] == after["rest"]
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def test_copies_share_teachers_and_numbers_of_threads_share_a_copy(task: DistillationTask) -> None:
    made = engine_search._copy(task)
    for old, new in zip(task.teachers.parameters(), made.teachers.parameters(), strict=True):
        assert old is new
    for old, new in zip(task.trainable_module.parameters(), made.trainable_module.parameters(), strict=True):
        assert old.data_ptr() != new.data_ptr()
    with engine_search._StepTimer(task, batch(), optimizer).running() as timer:
        timer.step(RULE)
        timer.step(replace(RULE, threads=1))
        assert len(timer.copies) == 1


@pytest.mark.parametrize(("hours", "tried"), [(0.5, False), (2.0, True)])
def test_only_long_trainings_try_compilation(
    task: DistillationTask, timed: Timer, monkeypatch: Any, hours: float, tried: bool
) -> None:
    monkeypatch.setattr(engine_search, "can_compile", lambda _: True)
    seen = timed(lambda e: 0.05 if e.compile != "off" else 0.1)
    trial, _ = run(task, int(hours * 3600 / 0.1), compile="auto")
    assert any(engine.compile == "default" for engine in seen) == tried
    assert trial.engine.compile == ("default" if tried else "off")


def test_failed_compilation_is_reported_and_disabled(task: DistillationTask, timed: Timer) -> None:
    def step(engine: Engine) -> float:
        if engine.compile != "off":
            raise RuntimeError("no compiler\nhere")
        return 0.1

    timed(step)
    trial, notes = run(task, steps=1, compile="on")
    assert trial.engine == RULE
    assert notes == ["compilation failed (RuntimeError: no compiler here); training continues uncompiled"]


class Run:
    """The part of a context that ``use_fastest_engine`` reads."""

    def __init__(self, record: RunRecord, **options: str) -> None:
        self.notes: list[str] = []
        self.options = SimpleNamespace(**{"precision": "auto", "compile": "auto", **options})
        self.folder = SimpleNamespace(record=record, save=lambda: None)
        self.display = SimpleNamespace(note=self.notes.append)
        self.ranks = Ranks()


@pytest.fixture
def settle(timed: Timer) -> Callable[..., tuple[Engine, list[str]]]:
    timed(lambda e: 0.01 if e.precision == "bf16" else 0.1)

    def settle(record: RunRecord, **options: str) -> tuple[Engine, list[str]]:
        task = distillation("none", Engine.from_record(record.engines["student"].model_dump()))
        job = Run(record, **options)
        pixels, labels = batch()
        first = Batch(pixels, labels, labels, None)
        how_long = plan(epochs=LONG)
        trainer.use_fastest_engine(job, "student", task, how_long, first, BATCH)  # type: ignore[arg-type]
        return task.engine, job.notes

    return settle


def a_record(**more: Any) -> RunRecord:
    entry = EngineEntry(key="k", name="a processor", **asdict(RULE), **more)
    return RunRecord(engines={"student": entry})


def test_chosen_engine_is_recorded_and_reused(settle: Any) -> None:
    record = a_record()
    engine, notes = settle(record, compile="off")
    assert engine == replace(RULE, precision="bf16")
    assert notes == [
        "engine: bf16, channels last, 1 thread: 800 images/s; fp32, channels last, 1 thread: 80 images/s; "
        "bf16, contiguous, 1 thread: 800 images/s"
    ]
    entry = record.engines["student"]
    assert Engine.from_record(entry.model_dump()) == engine and entry.key == "k"
    assert entry.trial == {
        "bf16, channels last, 1 thread": 800.0, "fp32, channels last, 1 thread": 80.0,
        "bf16, contiguous, 1 thread": 800.0,
    }  # fmt: skip
    assert settle(record, compile="off") == (engine, [])


def test_resumed_training_does_not_search(settle: Any) -> None:
    record = a_record(trial={})
    assert settle(record) == (RULE, [])


def test_compile_option_takes_precedence_over_the_record(settle: Any) -> None:
    record = a_record(trial={})
    engine, notes = settle(record, compile="on")
    assert engine.compile == "default"
    assert notes == ["student was started uncompiled and resumes compiled"]
    engine, notes = settle(record)
    assert engine.compile == "default" and notes == []
    engine, notes = settle(record, compile="off")
    assert engine.compile == "off" and notes == ["student was started compiled and resumes uncompiled"]


def test_cores_are_counted_without_hyper_threads(tmp_path: Any, monkeypatch: Any) -> None:
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("questpress.pipeline.runs.device.allowed_cores", lambda: 4)
    assert cores(tmp_path) == 2
    assert cores(tmp_path / "nowhere") == 4


def test_rank_does_not_step_alone(task: DistillationTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(engine_search, "compiles", lambda *_: pytest.fail("a step was taken"))
    compiled = replace(RULE, compile="default")
    assert engine_search.check_compilation(task, (), optimizer, compiled, pytest.fail) == compiled


def test_fixed_precision_ignores_the_option() -> None:
    notes: list[str] = []
    job = SimpleNamespace(
        folder=SimpleNamespace(record=RunRecord(), save=lambda: None), key="k", device="cpu",
        options=SimpleNamespace(precision="bf16", threads=None), display=SimpleNamespace(note=notes.append),
    )  # fmt: skip
    for _ in range(2):  # started, then resumed
        engine = trainer.choose_run_engine(
            job, "qat", lambda only: replace(RULE, precision=only), precision="fp32"
        )  # type: ignore[arg-type]
        assert engine.precision == "fp32"
    assert notes == []
