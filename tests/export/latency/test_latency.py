"""Percentiles and speed-ups: coverage of their intervals, and minimum numbers of samples."""

from collections.abc import Sequence

import numpy as np
import pytest
from questpress.export.latency.statistics import (
    MIN_SAMPLES,
    PERCENTILES,
    PROCESS_STD,
    ProcessSpread,
    Samples,
    _order_statistics,
    compute_process_spread,
    compute_speedup,
    summarize,
)
from scipy.stats import binom


@pytest.mark.parametrize("name", PERCENTILES)
def test_minimum_of_samples_is_that_of_mlperfs_load_generator(name: str) -> None:
    """With fewer, two or more samples being above the percentile is not 99 % certain."""
    n, above = MIN_SAMPLES[name], 1 - PERCENTILES[name]
    assert binom.cdf(1, n, above) < 0.01 <= binom.cdf(1, n - 1, above)


def one_round(samples: Sequence[float] | np.ndarray, name: str = "a") -> Samples:
    return Samples(name, 1, [np.asarray(samples, dtype=np.float64)])


@pytest.mark.parametrize("name", ["p50", "p90", "p99"])
def test_percentiles_interval_holds_the_true_one_95_times_of_100(name: str) -> None:
    rng, p, n = np.random.default_rng(1), PERCENTILES[name], 700
    held = 0
    for _ in range(200):
        blocks = np.split(rng.random(n), 20)
        interval = summarize(Samples("a", 1, blocks)).percentiles[name]
        assert interval.low is not None
        held += interval.low <= p and (interval.high is None or p <= interval.high)
    assert held / 200 >= 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5


def test_correlated_runs_count_as_fewer() -> None:
    """Every round has a different speed: 700 runs are hardly more than 20."""
    rng, held, naive = np.random.default_rng(2), 0, 0
    for _ in range(150):
        blocks = [rng.normal(level, 0.1, 35) for level in rng.normal(10, 1, 20)]
        interval = summarize(Samples("a", 1, blocks)).percentiles["p50"]
        held += (interval.low or -np.inf) <= 10 <= (interval.high or np.inf)
        alone = summarize(one_round(np.concatenate(blocks))).percentiles["p50"]
        naive += (alone.low or -np.inf) <= 10 <= (alone.high or np.inf)
    assert held / 150 >= 0.9 > 0.5 > naive / 150


def rounds(
    rng: np.random.Generator,
    name: str,
    base: float,
    *,
    n: int,
    processes: int,
    alike: float,
    spread: float,
    common: np.ndarray,
) -> Samples:
    """Medians of rounds that follow each other (an AR(1) of 1 %), of processes that differ."""
    noise = rng.normal(0, 0.01, n)
    for r in range(1, n):
        noise[r] = alike * noise[r - 1] + np.sqrt(1 - alike**2) * noise[r]
    of_processes = rng.normal(0, spread, processes)[np.arange(n) % processes]
    medians = base * np.exp(noise + of_processes + common)
    return Samples(name, 1, [np.array([median]) for median in medians], processes=processes)


@pytest.mark.parametrize(
    ("n", "processes", "alike", "spread"),
    [(20, 1, 0.0, 0.0), (20, 1, 0.5, 0.005), (20, 2, 0.3, 0.005), (99, 3, 0.3, 0.005), (99, 3, 0.6, 0.0)],
)
def test_speedups_interval_holds_the_true_ratio(n: int, processes: int, alike: float, spread: float) -> None:
    """Though rounds resemble each other, processes of one file differ, and the machine drifts."""
    rng, held, no_difference, times = np.random.default_rng(3), 0, 0, 100
    for seed in range(times):
        common = np.cumsum(rng.normal(0, 0.005, n))
        one, again, other = (
            rounds(rng, name, base, n=n, processes=processes, alike=alike, spread=spread, common=common)
            for name, base in (("one", 1.0), ("again", 1.0), ("other", 2.0))
        )
        pooled = compute_process_spread([one, again, other])
        speedup = compute_speedup(one, other, spread=pooled, seed=seed, resamples=300)
        held += speedup.low <= 2.0 <= speedup.high and speedup.verdict == "faster"
        no_difference += (
            compute_speedup(again, one, spread=pooled, seed=seed, resamples=300).verdict == "no difference"
        )
    assert held / times >= 0.95 - 2 * (0.95 * 0.05 / times) ** 0.5
    assert no_difference / times >= 0.95 - 2 * (0.95 * 0.05 / times) ** 0.5


def test_difference_of_five_percent_is_found() -> None:
    rng = np.random.default_rng(4)
    common = np.zeros(99)
    slow, fast = (
        rounds(rng, name, base, n=99, processes=3, alike=0.3, spread=0.004, common=common)
        for name, base in (("slow", 1.05), ("fast", 1.0))
    )
    assert compute_speedup(fast, slow).verdict == "faster" and compute_speedup(slow, fast).verdict == "slower"


def test_single_process_assumes_a_spread() -> None:
    latencies = [one_round([1.0, 1.1]), one_round([2.0, 2.1])]
    assert compute_process_spread(latencies) == ProcessSpread(PROCESS_STD, 0)
    several = Samples("a", 1, [np.array([1.0]), np.array([np.exp(0.02)])] * 10, processes=2)
    spread = compute_process_spread([several])
    assert spread.freedom == 1 and spread.std == pytest.approx(0.02 / np.sqrt(2))


def test_percentiles_interpolate_and_need_their_minimum_of_samples() -> None:
    rng = np.random.default_rng(0)
    for n, given in [
        (10, ""),
        (11, "50"),
        (64, "50 90"),
        (129, "50 90"),
        (130, "50 90 95"),
        (662, "50 90 95 99"),
    ]:
        samples = rng.permutation(np.arange(n, dtype=np.float64))
        runs = Samples("a", 1, [samples[: n // 2], samples[n // 2 :]])
        latency = summarize(runs)
        assert latency.n == n and latency.mean == pytest.approx((n - 1) / 2)
        for p in (50, 90, 95, 99):
            value = latency.value(f"p{p}")
            if str(p) in given.split():
                assert value == pytest.approx((n - 1) * p / 100)
            else:
                assert value is None
        np.testing.assert_array_equal(runs.ms, samples)


def test_no_outlier_is_dropped() -> None:
    latency = summarize(one_round([1.0] * 19 + [981.0]))
    assert latency.mean == 50.0 and latency.quantiles[100] == 981.0


def test_speedup_is_the_ratio_of_the_reported_medians() -> None:
    slow = Samples("slow", 1, [np.array([4.0, 4.0, 9.0]), np.array([6.0]), np.array([3.0, 3.0])])
    fast = Samples("fast", 1, [np.array([2.0]), np.array([2.0, 2.0, 7.0]), np.array([1.5])])
    speedup = compute_speedup(fast, slow)
    assert speedup.ratio == np.median(slow.ms) / np.median(fast.ms) == 2.0
    assert speedup.low < 2.0 < speedup.high and speedup.verdict == "faster"
    assert (
        compute_speedup(slow, fast).ratio == pytest.approx(0.5)
        and compute_speedup(slow, fast).verdict == "slower"
    )
    assert compute_speedup(slow, slow).verdict == "no difference"
    assert compute_speedup(fast, slow) == speedup
    with pytest.raises(ValueError, match="same rounds"):
        compute_speedup(fast, Samples("slow", 2, [np.array([1.0])] * 3))


@pytest.mark.parametrize("n", [22, 100, 231, 662])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_intervals_ends_are_the_binomials_ranks_exactly(n: int, p: float) -> None:
    ordered = np.arange(1, n + 1, dtype=float)
    interval = _order_statistics(ordered, p)
    first, last = int(binom.ppf(0.025, n, p)), int(binom.ppf(0.975, n, p)) + 1
    assert interval[0] == (ordered[first - 1] if first >= 1 else None)
    assert interval[1] == (ordered[last - 1] if last <= n else None)
