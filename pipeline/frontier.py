"""Which of several files are worth choosing between: the Pareto frontier of accuracy over latency."""

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Those that no other beats: none is as cheap and as good, and better in one of the two.

    Args:
        points: what each costs (less is better) and what it gives (more is better), both finite.

    Returns:
        Their indices, the cheapest first.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        last = points[kept[-1]] if kept else None
        # Of two alike in both neither beats the other: only their order or their names could choose one, and
        # a reader would take the other for worse.
        if last is None or points[i][1] > last[1] or points[i] == last:
            kept.append(i)
    return kept
