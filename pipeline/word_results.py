"""What is known of QuEST's words, for the report."""

from .runs.scores import Result


class ShownWord(Result):
    """A word as the pieces of images that are nearest to it."""

    rank: int
    """Its place among all words, the most used first, from 1."""
    share: float
    """Percent of the features whose nearest word it is."""
    patches: list[str]
    """The nearest first, each of another image; base64 of a PNG."""


class Words(Result):
    """QuEST's vocabulary of one teacher."""

    teacher: str
    words: int
    asked: int
    features: int
    features_used: int
    perplexity: float
    mu: float
    level: str = "map"
    note: str | None = None
    top: int | None = None
    """m, the words of p_T that a store keeps at each position."""
    lost_mass: float | None = None
    """The share of p_T that it loses with the others, on average."""
    usage: list[tuple[int, int]] = []
    """(rank, features whose nearest word it is) at some of the ranks, the most used word first."""
    dead: int | None = None
    """Words that are no feature's nearest."""
    shown: list[ShownWord] = []
    """Some, spread over the ranks; of the first vocabulary alone."""
    patch: int | None = None
    """Side of the patches in pixels of the teacher's input."""
    seen: int | None = None
    """Images that patches were looked for in."""
