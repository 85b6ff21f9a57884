"""Next to other processes, ratios are those of a quiet machine or are not reported."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from questpress.export.latency import noise
from questpress.export.latency.machine import choose_cores
from questpress.export.latency.noise import Counters
from questpress.export.latency.runner import BenchResult, Subject, bench
from questpress.export.latency.statistics import Samples, compare, summarize
from questpress.export.results import Conditions, Flag

from tests.export.latency.test_noise import neighbor, reading

# A subject of known work: hashes an amount of data in each run.
WORK = """
import hashlib, sys
from questpress.export.latency.worker import serve

def load(model, threads, shape):
    block = bytes(1 << 14)

    def run(image):
        for _ in range(int(sys.argv[1])):
            hashlib.blake2b(block)

    return run

serve(load)
"""


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "MAX_TAKEN", 0.05)


def working(folder: Path, name: str, amount: int) -> Subject:
    script = folder / "work.py"
    script.write_text(WORK)
    return Subject(name, "", np.zeros((1, 3, 8, 8), np.float32), (str(script), str(amount)))


def test_ratio_next_to_a_busy_loop_is_that_of_the_work_or_missing(tmp_path: Path) -> None:
    cores = choose_cores(1)
    if not cores or noise.read_counters().busy is None:
        pytest.skip("this system neither pins processes nor counts cores' time")
    subjects = [working(tmp_path, "slow", 60), working(tmp_path, "fast", 20)]
    with neighbor(cores[0]):
        result = bench(subjects, threads=[1], seconds=0.5, processes=2)
    assert not result.conditions[0].wall_time
    assert "neighbor" in [flag.name for flag in result.flags]
    ratio = result.speedup("fast", "slow", 1)
    assert ratio is None or (ratio.clock == "processor" and ratio.ratio == pytest.approx(3.0, rel=0.1))
    for latency in result.latencies:
        assert latency.percentiles == {} and latency.mean is None and latency.quantiles == []
    slow, fast = (latency.processor_ms for latency in result.latencies)
    assert slow is not None and fast is not None and slow / fast == pytest.approx(3.0, rel=0.15)
    if ratio is not None:
        assert ratio.ratio == pytest.approx(slow / fast)


def recorded(
    name: str, processor: float, wall: Sequence[float], *, threads: int = 1, scatter: float = 0.01
) -> Samples:
    """Return 40 rounds of 10 runs; `wall` are multiples of the processor time, round by round."""
    rng = np.random.default_rng(len(name))
    blocks = [processor * np.exp(rng.normal(0, scatter, 10)) for _ in range(40)]
    walls = [block * wall[i % len(wall)] for i, block in enumerate(blocks)]
    return Samples(name, threads, walls, processes=2, processor_blocks=blocks)


# Seen on a machine with load 20: each run of the teacher is interrupted, those of the student rarely are.
TEACHER = recorded("teacher", 6.0, [4.0, 9.0, 1.0, 12.0, 7.0])
STUDENT = recorded("student", 0.5, [1.0, 1.0, 6.0, 1.0, 1.0])


def result_of(samples: Sequence[Samples], *, wall_time: bool) -> BenchResult:
    conditions = [
        Conditions(
            threads=threads, rounds=40, processes=2, block_ms=100, cores=[0], governor=None,
            sentinel_ms=(1, 1, 1), process_spread=0.1, process_spread_measured=True, wall_time=wall_time,
        )
        for threads in {s.threads for s in samples}
    ]  # fmt: skip
    return BenchResult(tuple(samples), None, 0, tuple(conditions))  # type: ignore[arg-type]


def test_disturbed_bench_reports_the_ratio_of_processor_times() -> None:
    result = result_of([TEACHER, STUDENT], wall_time=False)
    ratio = result.speedup("student", "teacher", 1)
    assert ratio is not None and ratio.clock == "processor"
    assert ratio.ratio == pytest.approx(12.0, rel=0.01) and ratio.low <= 12.0 <= ratio.high
    assert [latency.p50 for latency in result.latencies] == [None, None]
    teacher, student = (latency.processor_ms for latency in result.latencies)
    assert teacher is not None and student is not None and ratio.ratio == pytest.approx(teacher / student)
    wall = result_of([TEACHER, STUDENT], wall_time=True).speedup("student", "teacher", 1)
    assert wall is not None and wall.clock == "wall" and wall.ratio > 40


def test_ratio_and_medians_agree_in_wall_time() -> None:
    result = result_of([TEACHER, STUDENT], wall_time=True)
    ratio, (teacher, student) = result.speedup("student", "teacher", 1), result.latencies
    assert ratio is not None and teacher.p50 and student.p50
    assert ratio.ratio == pytest.approx(teacher.p50 / student.p50)
    assert ratio.low < ratio.ratio < ratio.high


def test_processor_time_of_several_threads_is_not_compared() -> None:
    pair = [recorded(name, 1.0, [1.0], threads=2) for name in ("a", "bb")]
    assert compare(pair, "a", "bb", wall_time=False, seed=0) is None
    assert compare(pair, "a", "bb", wall_time=True, seed=0) is not None


def test_uncertain_or_unmeasured_processor_time_is_not_compared() -> None:
    rough = recorded("rough", 0.5, [1.0], scatter=1.0)
    assert compare([TEACHER, rough], "rough", "teacher", wall_time=False, seed=0) is None
    unmeasured = Samples("unmeasured", 1, STUDENT.blocks, processes=2)
    coarse = Samples("coarse", 1, STUDENT.blocks, 2, True, [0 * block for block in STUDENT.blocks])
    for missing in (unmeasured, coarse):
        assert compare([TEACHER, missing], missing.subject, "teacher", wall_time=False, seed=0) is None
        assert summarize(missing, wall_time=False).processor_ms is None


def flag(name: str, value: float) -> Flag:
    return Flag(name=name, threads=1, sentence="", figures={"value": value, "limit": 0.0})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        ([flag("neighbor", 0.051)], False),
        ([flag("steal", 0.03)], True),
        ([flag("steal", 0.06)], False),
        ([flag("throttled", 4)], True),  # at most 0.4 s of 10
        ([flag("throttled", 6)], False),
        ([flag("machine", 0.9), flag("drift", 0.5), flag("sentinel", 1.0)], True),
    ],
)
def test_wall_time_is_reported_if_others_take_at_most_five_percent(flags: list[Flag], expected: bool) -> None:
    assert noise.measures_wall_time(flags, 10.0) is expected


def test_waiting_is_measured_without_the_systems_counters() -> None:
    assert noise.check_waiting([recorded("a", 1.0, [1.0, 1.04])], 1) == []
    [found] = noise.check_waiting([recorded("a", 1.0, [1.0, 3.0])], 1)
    assert found.name == "neighbor" and found.figures["value"] == pytest.approx(0.5, abs=0.02)
    assert found.sentence == "The processes waited 50 % of the time for the cores under test."
    assert noise.check_waiting([recorded("a", 1.0, [1.0, 3.0], threads=2)], 2) == []
    assert noise.check_waiting([Samples("a", 1, [np.ones(3)])], 1) == []


def test_counters_without_the_benchs_own_time_are_not_used() -> None:
    before, zeros = reading(0, {0: 0.0}), reading(10, {0: 0.0})
    assert noise.drop_implausible(before, zeros, 9.0, (0,)).busy is None
    counted = reading(10, {0: 9.0})
    assert noise.drop_implausible(before, counted, 9.0, (0,)) is counted


def test_own_process_on_the_pinned_core_is_no_neighbor() -> None:
    before = Counters(0, {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}, 0, 0.0)
    pinned = Counters(10, {0: 0.0, 1: 10.0}, {0: 0.0, 1: 0.0}, 0, 1.0, frozenset({1}))
    assert noise.check_counters(before, pinned, 9.0, (1,), 1) == []
    elsewhere = Counters(10, {0: 0.0, 1: 10.0}, {0: 0.0, 1: 0.0}, 0, 1.0, frozenset({0, 1}))
    [found] = noise.check_counters(before, elsewhere, 9.0, (1,), 1)
    assert found.name == "neighbor" and math.isclose(found.figures["value"], 0.1)
