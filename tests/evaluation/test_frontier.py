import random

from questpress.pipeline.evaluation.metrics import frontier


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
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


def test_of_two_alike_in_both_each_is_on_it_in_the_order_given() -> None:
    assert frontier([(2, 80), (1, 70), (2, 80), (1, 69), (3, 80)]) == [1, 0, 2]
    assert frontier([]) == []
