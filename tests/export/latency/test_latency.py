"""Percentiles and speed-ups say as much as their samples carry, and no more."""

from collections.abc import Sequence

import numpy as np
import pytest
from questpress.export.latency.statistics import (
    PERCENTILES,
    PROCESS_SPREAD,
    Latency,
    Spread,
    _order_statistics,
    estimate,
    least_runs,
    process_spread,
    speedup,
    summarise,
)
from scipy.stats import binom


def test_the_fewest_runs_of_a_percentile_are_those_of_mlperfs_load_generator() -> None:
    # With one run slower: LoadGen's least numbers of queries. With none: its published 459 for p99.
    assert [least_runs(p) for p in (0.5, 0.9, 0.95, 0.99, 0.999)] == [11, 64, 130, 662, 6636]
    assert least_runs(0.99, slower=0) == 459


def test_the_early_stopping_estimate_leaves_aside_as_many_as_the_load_generator_does() -> None:
    # Its loop, word for word: the first t for which n runs are too few, minus one.
    def by_counting(n: int, p: float) -> int:
        t = 1
        while least_runs(p, slower=t + 1) <= n:
            t += 1
        return t

    for n in (64, 65, 131, 500, 1024):
        samples = np.random.default_rng(n).permutation(np.arange(float(n)))
        assert estimate(samples, 0.9) == n - by_counting(n, 0.9)
    assert estimate(np.arange(63.0), 0.9) is None
    assert estimate(np.arange(64.0), 0.9) == 63.0


def test_the_early_stopping_estimate_is_hardly_ever_below_the_percentile() -> None:
    rng = np.random.default_rng(0)
    below = sum(float(estimate(rng.random(1024), 0.9) or 0) < 0.9 for _ in range(1000))
    assert below <= 10 + 3 * 3.2  # one in a hundred, and three standard deviations


def one_round(samples: Sequence[float] | np.ndarray, name: str = "a") -> Latency:
    return summarise(name, 1, [np.asarray(samples, dtype=np.float64)])


@pytest.mark.parametrize("name", ["p50", "p90", "p99"])
def test_a_percentiles_interval_holds_the_true_one_95_times_of_100(name: str) -> None:
    rng, p, n = np.random.default_rng(1), PERCENTILES[name], 700
    held = 0
    for _ in range(200):
        blocks = np.split(rng.random(n), 20)
        interval = summarise("a", 1, blocks).intervals[name]
        assert interval.low is not None
        held += interval.low <= p and (interval.high is None or p <= interval.high)
    assert held / 200 >= 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5


def test_runs_that_resemble_each_other_count_as_fewer() -> None:
    """Every round has a speed of its own: 700 runs are hardly more than 20."""
    rng, held, naive = np.random.default_rng(2), 0, 0
    for _ in range(150):
        blocks = [rng.normal(level, 0.1, 35) for level in rng.normal(10, 1, 20)]
        interval = summarise("a", 1, blocks).intervals["p50"]
        held += (interval.low or -np.inf) <= 10 <= (interval.high or np.inf)
        alone = one_round(np.concatenate(blocks)).intervals["p50"]
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
) -> Latency:
    """Medians of rounds that follow each other (an AR(1) of 1 %), of processes that differ."""
    noise = rng.normal(0, 0.01, n)
    for r in range(1, n):
        noise[r] = alike * noise[r - 1] + np.sqrt(1 - alike**2) * noise[r]
    of_processes = rng.normal(0, spread, processes)[np.arange(n) % processes]
    medians = base * np.exp(noise + of_processes + common)
    return summarise(name, 1, [np.array([median]) for median in medians], processes=processes)


@pytest.mark.parametrize(
    ("n", "processes", "alike", "spread"),
    [(20, 1, 0.0, 0.0), (20, 1, 0.5, 0.005), (20, 2, 0.3, 0.005), (99, 3, 0.3, 0.005), (99, 3, 0.6, 0.0)],
)
def test_a_speedups_interval_holds_the_true_ratio(
    n: int, processes: int, alike: float, spread: float
) -> None:
    """Though rounds resemble each other, processes of one file differ, and the machine drifts."""
    rng, held, no_difference, times = np.random.default_rng(3), 0, 0, 100
    for seed in range(times):
        common = np.cumsum(rng.normal(0, 0.005, n))
        one, again, other = (
            rounds(rng, name, base, n=n, processes=processes, alike=alike, spread=spread, common=common)
            for name, base in (("one", 1.0), ("again", 1.0), ("other", 2.0))
        )
        pooled = process_spread([one, again, other])
        found = speedup(one, other, spread=pooled, seed=seed, resamples=300)
        held += found.low <= 2.0 <= found.high and found.verdict == "faster"
        no_difference += (
            speedup(again, one, spread=pooled, seed=seed, resamples=300).verdict == "no difference"
        )
    assert held / times >= 0.95 - 2 * (0.95 * 0.05 / times) ** 0.5
    assert no_difference / times >= 0.95 - 2 * (0.95 * 0.05 / times) ** 0.5


def test_a_difference_of_five_percent_is_found() -> None:
    rng = np.random.default_rng(4)
    common = np.zeros(99)
    slow, fast = (
        rounds(rng, name, base, n=99, processes=3, alike=0.3, spread=0.004, common=common)
        for name, base in (("slow", 1.05), ("fast", 1.0))
    )
    assert speedup(fast, slow).verdict == "faster" and speedup(slow, fast).verdict == "slower"


def test_one_process_of_each_file_leaves_its_spread_to_be_assumed() -> None:
    latencies = [one_round([1.0, 1.1]), one_round([2.0, 2.1])]
    assert process_spread(latencies) == Spread(PROCESS_SPREAD, 0)
    several = summarise("a", 1, [np.array([1.0]), np.array([np.exp(0.02)])] * 10, processes=2)
    found = process_spread([several])
    assert found.freedom == 1 and found.deviation == pytest.approx(0.02 / np.sqrt(2))


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
        latency = summarise("a", 1, [samples[: n // 2], samples[n // 2 :]])
        assert latency.n == n and latency.mean == pytest.approx((n - 1) / 2)
        for p in (50, 90, 95, 99):
            value = getattr(latency, f"p{p}")
            if str(p) in given.split():
                assert value == pytest.approx((n - 1) * p / 100)
            else:
                assert value is None
        np.testing.assert_array_equal(latency.samples, samples)
        assert latency.rounds.tolist() == [0] * (n // 2) + [1] * (n - n // 2)


def test_no_outlier_is_dropped() -> None:
    latency = summarise("a", 1, [np.array([1.0] * 19 + [981.0])])
    assert latency.mean == 50.0 and latency.samples.max() == 981.0


def test_a_speedup_is_the_median_of_the_rounds_ratios() -> None:
    slow = summarise("slow", 1, [np.array([4.0, 4.0, 9.0]), np.array([6.0]), np.array([3.0, 3.0])])
    fast = summarise("fast", 1, [np.array([2.0]), np.array([2.0, 2.0, 7.0]), np.array([1.5])])
    found = speedup(fast, slow)
    assert found.ratio == pytest.approx(2.0) and found.low < 2.0 and found.verdict == "faster"
    assert found.high > 3.0  # one of three rounds says so
    assert speedup(slow, fast).ratio == pytest.approx(0.5) and speedup(slow, fast).verdict == "slower"
    assert speedup(slow, slow).verdict == "no difference"
    assert speedup(fast, slow) == found
    with pytest.raises(ValueError, match="same rounds"):
        speedup(fast, summarise("slow", 2, [np.array([1.0])] * 3))


@pytest.mark.parametrize("n", [22, 100, 231, 662])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_an_intervals_ends_are_the_binomials_ranks_exactly(n: int, p: float) -> None:
    ordered = np.arange(1, n + 1, dtype=float)
    found = _order_statistics(ordered, p)
    first, last = int(binom.ppf(0.025, n, p)), int(binom.ppf(0.975, n, p)) + 1
    assert found.low == (ordered[first - 1] if first >= 1 else None)
    assert found.high == (ordered[last - 1] if last <= n else None)
