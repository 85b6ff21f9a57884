"""The harnesses that take time: rounds of training steps, how costs grow, and what they report."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import growth
from benchmarks.training import ours, peers, pictures, rounds, throughput


class Clock:
    """Time that passes only where a toy subject lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: self.now)

    def subject(self, name: str, seconds: float, images: int = 1) -> Any:
        def step() -> None:
            self.now += seconds
            self.calls.append(name)

        begin, end = (partial(self.calls.append, f"{word} {name}") for word in ("begin", "end"))
        return rounds.Subject(name, images, step, begin, end)


def timed(name: str, *milliseconds: float) -> Any:
    return rounds.Samples(name, 1, [np.array([value]) for value in milliseconds])


def test_round_measures_milliseconds_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pair = [clock.subject("slow", 0.5, images=10), clock.subject("fast", 0.01, images=2)]
    slow, fast = rounds.measure(pair, seconds=1.0, rounds=5, threads=1)
    assert slow.ms == pytest.approx([50] * 5) and fast.ms == pytest.approx([5] * 5)
    # A fifth of a second each: one slow step, twenty fast ones, with the subject's begin and end around them.
    calls = " ".join(clock.calls)
    assert calls.count("begin slow slow end slow") == 7  # two blocks of it to warm up
    assert calls.count("begin fast" + 20 * " fast" + " end fast") >= 5
    assert clock.calls != sorted(clock.calls)


def test_ratio_compares_times_or_throughput_with_its_goal() -> None:
    measured = [timed("plain", 10, 10, 10), timed("teacher", 10, 10, 10), timed("online", 22, 22, 22)]
    rows = rounds.compare(
        measured,
        [
            rounds.Comparison("both", "time", "online", ("plain", "teacher"), 1.15),
            rounds.Comparison("alone", "time", "online", ("plain",), 1.15),
            rounds.Comparison("rate", "rate", "plain", ("online",), 2.0),
            rounds.Comparison("not there", "time", "stored", ("plain",), 1.1),
            rounds.Comparison("no goal", "rate", "plain", ("online",)),
        ],
    )
    assert [row["text"] for row in rows] == ["both", "alone", "rate", "no goal"]
    assert [row["ratio"] for row in rows] == pytest.approx([1.1, 2.2, 2.2, 2.2])
    assert [row["reached"] for row in rows] == [True, False, True, None]
    assert "| both | time | 1.10 | 1.08 to 1.12 | ≤ 1.15 | yes |" in rounds.ratios_table(rows)


def test_goal_inside_the_interval_is_undecided() -> None:
    noisy = timed("online", 5, 20, 5, 20, 10)
    plain = timed("plain", 10, 10, 10, 10, 10)
    (row,) = rounds.compare([plain, noisy], [rounds.Comparison("", "time", "online", ("plain",), 1.1)])
    assert row["low"] < 1.1 < row["high"] and row["reached"] is None
    (rate,) = rounds.rates([noisy])
    assert rate["images_per_second"] == pytest.approx(100)
    assert rate["rounds"] == pytest.approx([200, 50, 200, 50, 100])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The arguments for a pair of little networks; threads stay as they were."""
    monkeypatch.setitem(throughput.PAIRS, "tiny", throughput.Pair("cifar_resnet14", "cifar_resnet8", 16))
    threads = torch.get_num_threads()
    yield [
        *("--pairs", "tiny", "--seconds", "0.02", "--rounds", "2", "--images", "32", "--batch", "8"),
        *("--words", "8", "--classes", "3", "--device", "cpu", "--threads", "1", "--workers", "0"),
    ]
    torch.set_num_threads(threads)


def test_pair_is_timed_with_all_that_is_installed(tiny: list[str]) -> None:
    pytest.importorskip("timm")
    options = throughput.parse([*tiny, "--subjects", "supervised;QuEST;teacher alone;timm"])
    results = throughput.run("tiny", options)
    names = [row["subject"] for row in results["rates"]]
    of_quest = [name for name in throughput.OURS if "KD" not in name]
    assert names == [*of_quest, *(f"timm KD, {how}" for how in throughput.VARIANTS)]
    assert all(row["images_per_second"] > 0 for row in results["rates"])
    ratios = {row["text"]: row for row in results["ratios"]}
    assert len(ratios) == len(results["ratios"])
    assert ratios["QuEST online, over supervised + teacher"]["kind"] == "time"
    assert ratios["QuEST stored, sampled positions, over supervised"]["goal"] == 1.15
    assert "QuEST stored, over timm" in ratios and "QuEST stored, over torchdistill" not in ratios
    assert "cifar_resnet14 → cifar_resnet8, 16 pixels, batch 8" in throughput.text(results)


def test_package_that_is_missing_is_left_out(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("No module named 'torchdistill'")

    monkeypatch.setitem(throughput.PEERS, "torchdistill", missing)
    results = throughput.run("tiny", throughput.parse([*tiny, "--subjects", "supervised;torchdistill"]))
    assert [row["subject"] for row in results["rates"]] == ["supervised"]
    assert "torchdistill is left out: No module named 'torchdistill'" in capsys.readouterr().err


def test_peers_use_equal_networks_and_pixels(tmp_path: Path) -> None:
    images = pictures.made_up(16, 3, 16).train
    setting = ours.Setting(
        teacher="cifar_resnet14", student="cifar_resnet8", size=16, batch=8, images=images, classes=3,
        words=8, top=8, positions=4, device="cpu", threads=torch.get_num_threads(), precision="fp32",
        compile="off", workers=0, scratch=tmp_path,
    )  # fmt: skip
    views = next(setting.stream()).pixels
    teacher, student = peers._networks(setting, True)
    assert not teacher.training and student.training
    expected = setting.frozen_teacher(views, frozenset({"logits"}))["logits"]
    torch.testing.assert_close(teacher(views), expected, rtol=1e-4, atol=1e-4)  # ours is folded
    assert next(iter(student.parameters())).is_contiguous(memory_format=torch.channels_last)


def test_growth_is_reported_as_an_exponent_with_its_interval() -> None:
    sizes = np.tile([1, 2, 4, 8], 2)
    noisy = growth.fit(sizes, sizes**1.5 * np.repeat([1.1, 0.9], 4))
    # By hand: residuals ±d with d = log(1.1 / 0.9) / 2, so s² = 8d² / 6, and Sxx = 10 log(2)².
    half = 2.4469 * np.log(1.1 / 0.9) / 2 * np.sqrt(8 / 6 / 10) / np.log(2)
    assert (noisy.value, noisy.high - 1.5) == pytest.approx((1.5, half), rel=1e-4)
    costs = [{"step": {"seconds": 0.3 * n, "megabytes": 1.0, "written": 0.0}} for n in (1, 2, 4, 8)]
    [row] = growth.rows("images", [growth.Size(images=n) for n in (1, 2, 4, 8)], [costs, costs])
    assert row == ["step", "0.3", "0.6", "1.2", "2.4", "1.00 (1.00 to 1.00)", "1", "", "0", ""]
