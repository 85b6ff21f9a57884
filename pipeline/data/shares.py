"""How much of a set each role gets when we split it."""

TEST_FRACTION = 0.1
SELECT_FRACTION = 0.1


def share(count: int, fraction: float, most: int) -> int:
    """How many of ``count`` images a role gets: the fraction, but one at least."""
    return min(max(1, round(count * fraction)), max(1, most))
