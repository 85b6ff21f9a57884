"""Disturbances of a bench raise flags, and its own load does not."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from questpress.export.latency import noise
from questpress.export.latency.machine import choose_cores, read_governor
from questpress.export.latency.noise import Counters
from questpress.export.latency.runner import Subject, bench
from questpress.export.latency.statistics import Samples
from questpress.export.results import Flag

# A subject of known latency: a busy loop whose length varies by 2 % between runs and by 0.2 % between
# processes. It serves requests itself, so that it starts fast.
KNOWN = """
import json, os, random, struct, sys, time
chance = random.Random(os.urandom(8))
latency = float(sys.argv[1]) * chance.lognormvariate(0, 0.002)
def reply(head, body=b""):
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\\n" + body)
    sys.stdout.buffer.flush()
sys.stdin.readline()
reply({"ready": True})
for line in sys.stdin:
    end = time.perf_counter() + json.loads(line)["seconds"]
    times = []
    while not times or time.perf_counter() < end:
        wanted = latency * chance.lognormvariate(0, 0.02)
        start = time.perf_counter()
        while (taken := 1000 * (time.perf_counter() - start)) < wanted:
            pass
        times.append(taken)
    reply({"bytes": 8 * len(times), "cpu": time.process_time()}, struct.pack(f"{len(times)}d", *times))
"""


def create_subject(folder: Path, name: str, milliseconds: float) -> Subject:
    script = folder / "known.py"
    script.write_text(KNOWN)
    return Subject(name, "", np.zeros((1, 3, 8, 8), np.float32), (str(script), str(milliseconds)))


def test_known_latencies_are_compared(tmp_path: Path) -> None:
    """The coverage of the interval is tested without a clock, in test_latency.py."""
    subjects = [create_subject(tmp_path, "slow", 1.5), create_subject(tmp_path, "fast", 1.0)]
    speedup = bench(subjects, threads=[1], seconds=0.5, processes=2).speedup("fast", "slow", 1)
    assert 1.4 < speedup.ratio < 1.6 and speedup.verdict == "faster"


def test_same_file_twice_is_no_difference(tmp_path: Path) -> None:
    pair = [create_subject(tmp_path, "A", 0.5), create_subject(tmp_path, "A again", 0.5)]
    verdicts = [
        bench(pair, threads=[1], seconds=0.1, processes=2, seed=seed).speedup("A again", "A", 1).verdict
        for seed in range(5)
    ]
    assert verdicts.count("no difference") >= 3


@contextmanager
def neighbor(core: int) -> Iterator[None]:
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_busy_neighbor_raises_a_flag(tmp_path: Path) -> None:
    if not choose_cores(1) or noise.read_counters().busy is None:
        pytest.skip("this system neither pins processes nor counts cores' time")
    with neighbor(choose_cores(1)[0]):
        result = bench([create_subject(tmp_path, "A", 0.5)], threads=[1], seconds=1.0)
    [raised] = [flag for flag in result.flags if flag.name == "neighbor"]
    # The system and its other processes decide how much time a neighbor gets.
    assert raised.threads == 1 and raised.figures["value"] > noise.LIMITS["neighbor"]
    assert raised.sentence.endswith("of the cores under test.")


def reading(
    at: float,
    busy: Mapping[int, float] | None,
    stolen: Mapping[int, float] | None = None,
    throttled: int | None = 0,
) -> Counters:
    return Counters(
        at, busy, stolen if stolen is not None or busy is None else dict.fromkeys(busy, 0.0), throttled
    )


def names(flags: list[Flag]) -> list[str]:
    return [flag.name for flag in flags]


def test_own_time_is_no_neighbors() -> None:
    before = reading(0, {0: 5.0, 1: 5.0})
    quiet = reading(10, {0: 15.0, 1: 5.1})
    assert noise.check_counters(before, quiet, 9.9, (0,), 1) == []
    [flag] = noise.check_counters(before, quiet, 9.0, (0,), 1)
    assert flag.name == "neighbor" and flag.figures == {"value": pytest.approx(0.1), "limit": 0.05}
    elsewhere = reading(10, {0: 15.0, 1: 12.0})
    assert names(noise.check_counters(before, elsewhere, 9.9, (0,), 1)) == ["machine"]
    # The other core is its own too with two threads.
    assert names(noise.check_counters(before, elsewhere, 16.9, (0, 1), 2)) == []


def test_stolen_and_throttled_time_raises_a_flag() -> None:
    before = reading(0, {0: 0.0}, {0: 1.0})
    after = reading(10, {0: 10.0}, {0: 1.5}, 3)
    flags = noise.check_counters(before, after, 10.0, (0,), 1)
    assert names(flags) == ["steal", "throttled"]
    assert flags[0].sentence == "The host gave 5 % of this virtual machine's cores to others."
    assert flags[1].sentence == "The container's CPU quota stopped its processes 3 times."


def test_unavailable_counters_are_named() -> None:
    nothing = reading(0, None, throttled=None)
    assert noise.list_unchecked(nothing, ()) == ["neighbor", "machine", "steal", "throttled"]
    assert noise.check_counters(nothing, reading(9, None, throttled=None), 1.0, (), 1) == []
    assert noise.list_unchecked(reading(0, {0: 1.0}), (0,)) == []


def test_counters_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(
        "cpu  300 0 100 900 5 0 0 7 0 0\n"
        "cpu0 100 20 50 400 5 3 2 7 0 0\ncpu1 200 0 50 500 0 0 0 0 0 0\nintr 5\n"
    )
    ticks = os.sysconf("SC_CLK_TCK")
    counters = noise.read_counters(tmp_path)
    assert counters.busy == {0: 175 / ticks, 1: 250 / ticks} and counters.stolen == {0: 7 / ticks, 1: 0.0}
    assert noise.read_counters(tmp_path / "none").busy is None


@pytest.mark.parametrize("line", ["0::/a/b", "3:cpu,cpuacct:/a/b"])
def test_throttling_is_counted_by_both_versions_of_cgroups(tmp_path: Path, line: str) -> None:
    root = tmp_path / "fs"
    mount = root if line.startswith("0") else root / "cpu,cpuacct"
    (mount / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup").write_text(f"{line}\n")
    assert noise.count_throttled(tmp_path / "cgroup", root) is None
    (mount / "a" / "b" / "cpu.stat").write_text("nr_periods 9\nnr_throttled 0\nthrottled_usec 0\n")
    (mount / "a" / "cpu.stat").write_text("nr_periods 9\nnr_throttled 4\nthrottled_time 70\n")
    assert noise.count_throttled(tmp_path / "cgroup", root) == 4


def test_changing_sentinel_raises_a_flag() -> None:
    rng = np.random.default_rng(0)
    assert noise.check_sentinel(rng.normal(2.0, 0.01, 50), 1) == []
    [flag] = noise.check_sentinel(np.concatenate([np.full(25, 2.0), np.full(25, 2.4)]), 1)
    assert flag.name == "sentinel" and flag.figures["value"] == pytest.approx(0.4 / 2.2)


def test_drift_and_differing_processes_raise_flags() -> None:
    rng = np.random.default_rng(0)
    steady, still = rng.normal(2.0, 0.02, 60), rng.normal(1.0, 0.005, 60)
    latency = Samples("a", 1, [np.array([median]) for median in steady], processes=2)
    assert noise.check_samples([latency], still, 1) == []
    rising = steady * np.linspace(1, 1.1, 60)
    latency = Samples("a", 1, [np.array([median]) for median in rising], processes=2)
    [flag] = noise.check_samples([latency], still, 1)
    assert flag.name == "drift" and flag.sentence.startswith(
        "In the last third of the rounds a was 7.6 % slower"
    )
    apart = steady * np.tile([1.0, 1.08], 30)
    latency = Samples("a", 1, [np.array([median]) for median in apart], settled=False, processes=2)
    assert names(noise.check_samples([latency], still, 1)) == ["repeat", "unsettled"]


def test_scatter_alone_is_no_drift() -> None:
    rng = np.random.default_rng(1)
    assert sum(noise.compute_drift(np.exp(rng.normal(0, 0.1, 30))) != 0 for _ in range(200)) <= 4


def test_threads_get_physical_cores_of_the_fastest_kind_and_core_0_last(tmp_path: Path) -> None:
    for core in range(6):  # 0 and 1 share a core, as do 2 and 3; 4 and 5 are small ones
        folder = tmp_path / f"cpu{core}"
        (folder / "topology").mkdir(parents=True)
        (folder / "cpufreq").mkdir()
        pair = "0-1" if core < 2 else "2-3" if core < 4 else str(core)
        (folder / "topology" / "thread_siblings_list").write_text(f"{pair}\n")
        (folder / "cpufreq" / "cpuinfo_max_freq").write_text("5000\n" if core < 4 else "3000\n")
        (folder / "cpufreq" / "scaling_governor").write_text("performance\n" if core < 4 else "powersave\n")
    assert choose_cores(1, system=tmp_path, allowed=range(6)) == (2,)
    assert choose_cores(2, system=tmp_path, allowed=range(6)) == (0, 2)
    assert choose_cores(4, system=tmp_path, allowed=range(6)) == (0, 2, 4, 5)
    assert choose_cores(2, system=tmp_path, allowed=[1, 4]) == (1, 4)
    assert choose_cores(3, system=tmp_path, allowed=[1, 4]) == ()
    assert read_governor((0, 4), system=tmp_path) == "performance, powersave"
    assert read_governor((9,), system=tmp_path) is None
