"""`--baseline`: the same student without the teacher, and what the teacher brought."""

from pathlib import Path

import numpy as np
import pytest
from questpress.pipeline.evaluation.comparison import mcnemar, paired_interval

from tests.support import little
from tests.support.little import job, record, refused, report, weights


def test_baseline_is_the_run_without_a_teacher_and_is_added_to_a_finished_run(
    a_run: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    before = record(a_run)["stages"]
    result = little.check_success(job(data, a_run, cache, "--baseline"))
    assert result.stderr.count("(kept)") == len(before) - 1  # all but the report
    alone = tmp_path / "alone"
    without = ("--method", "none", "--data", data, "--out", alone, "--cache", cache, "--until", "validate")
    little.check_success(little.compress(*little.NETWORKS, *little.SMALL, *little.SHORT, *without))
    assert weights(a_run / "baseline.safetensors") == weights(alone / "student.safetensors")
    whole = report(a_run)
    baseline = whole["baseline"]
    assert baseline["score"]["correct"] == report(alone)["student"]["score"]["correct"]
    assert baseline["student"]["correct"] == whole["student"]["score"]["correct"]
    assert baseline["points"] == pytest.approx(baseline["student"]["percent"] - baseline["score"]["percent"])
    assert baseline["low"] <= baseline["points"] <= baseline["high"]
    assert "the teacher brought" in (a_run / "report.html").read_text()
    assert {epoch["stage"] for epoch in whole["epochs"]} >= {"student", "baseline"}
    exported = little.check_success(job(data, a_run, cache, "--baseline", "--bench-seconds", "0.02"))
    assert exported.stderr.count("(kept)") == len(before) - 1, "all but bench and report"


def test_paired_interval_covers_the_difference() -> None:
    rng = np.random.default_rng(0)
    n, inside = 200, []
    for _ in range(2000):
        first, second = rng.random(n) < 0.9, rng.random(n) < 0.84
        low, high = paired_interval(int((first & ~second).sum()), int((second & ~first).sum()), n)
        inside.append(low <= 6 <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert mcnemar(12, 3) < 0.05 and paired_interval(12, 3, n)[0] > 0
    assert paired_interval(0, 0, 10) == pytest.approx((-49 / 3, 49 / 3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--baseline", "--method", "none"), "--baseline has no effect with --method none"),
        (("--until", "baseline"), "--until baseline requires --baseline"),
    ],
)
def test_unusable_options_are_refused(
    more: tuple[str, ...], message: str, data: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = (*little.NETWORKS, "--data", data, "--out", tmp_path / "run", "--cache", cache, *more)
    assert message in refused(little.compress(*arguments), 2)
