import random
from math import comb

import pytest
from questpress.pipeline.evaluation.comparison import compare_unpaired, frontier, holm, mcnemar
from questpress.pipeline.runs.scores import Proportion


def test_frontier_is_not_dominated() -> None:
    chance = random.Random(3)
    points = [(float(chance.randint(1, 9)), float(chance.randint(40, 60))) for _ in range(60)]

    def beaten(cost: float, score: float) -> bool:
        return any(
            other <= cost and more >= score and (other < cost or more > score) for other, more in points
        )

    kept = frontier(points)
    assert sorted(kept) == [i for i, point in enumerate(points) if not beaten(*point)]
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)
    fastest = min(points, key=lambda point: (point[0], -point[1]))
    assert points[kept[0]] == fastest and points[kept[-1]][1] == max(score for _, score in points)


def test_ties_on_the_frontier_keep_their_order() -> None:
    assert frontier([(2, 80), (1, 70), (2, 80), (1, 69), (3, 80)]) == [1, 0, 2]
    assert frontier([]) == []


def test_mcnemar_holm_and_newcombe_are_those_by_hand() -> None:
    tail = sum(comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(2, 8) == pytest.approx(2 * tail) and mcnemar(0, 0) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    # Newcombe (1998), table II: 56/70 against 48/80, method 10.
    test = compare_unpaired(Proportion.from_counts(56, 70), Proportion.from_counts(48, 80))
    assert (test.low, test.high) == pytest.approx((5.24, 33.39), abs=0.01)
    pooled = 104 / 150
    z = 0.2 / (pooled * (1 - pooled) * (1 / 70 + 1 / 80)) ** 0.5
    assert test.p == pytest.approx(0.0080, abs=2e-4) and z == pytest.approx(2.65, abs=0.01)
