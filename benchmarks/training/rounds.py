"""Training steps timed side by side: warm-up, then interleaved rounds in one process, and ratios of them.

A round is a block of steps of every subject, in seeded random order. Of a block comes one number,
milliseconds an image: what waits for the device, for data or for a worker process is in it, which medians
over steps would hide. Ratios are taken within rounds, with the paired bootstrap of
``export/latency/statistics.py``.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from questpress.export.latency.statistics import Samples, compute_speedup
from questpress.export.results import Speedup

from benchmarks.cells import markdown


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Subject:
    """Something that trains. A ``step`` takes ``images`` images and may leave work running on the device.

    ``begin`` and ``end`` stand around each of its blocks, untimed: processes that work for the subject beside
    its steps rest in between, so that they neither disturb the others nor work ahead.
    """

    name: str
    images: int
    step: Callable[[], Any]
    begin: Callable[[], None] = nothing
    end: Callable[[], None] = nothing


@dataclass(frozen=True)
class Comparison:
    """A row of the table of ratios: how much time ``subject`` takes, or how high its rate is.

    ``baseline`` names what it is compared with; of several the times are added. ``goal`` is the most time or
    the least rate asked for.
    """

    text: str
    kind: Literal["time", "rate"]
    subject: str
    baseline: tuple[str, ...]
    goal: float | None = None


def measure(
    subjects: Sequence[Subject],
    *,
    seconds: float,
    rounds: int,
    threads: int,
    seed: int = 0,
    synchronise: Callable[[], None] = nothing,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Samples]:
    """Milliseconds an image of each subject, one sample a round.

    Args:
        seconds: of timed steps for each subject, about; a block has at least one step.
        threads: what the process was given; recorded.
        synchronise: waits for the device.
    """
    steps = []
    for subject in subjects:
        tell(f"warming up {subject.name}")
        steps.append(_warm_up(subject, seconds / rounds, synchronise))
    blocks: list[list[np.ndarray]] = [[] for _ in subjects]
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for index in rng.permutation(len(subjects)):
            spent = _block(subjects[index], steps[index], synchronise)
            blocks[index].append(np.array([1000 * spent / (steps[index] * subjects[index].images)]))
    return [
        Samples(subject.name, threads, of_subject)
        for subject, of_subject in zip(subjects, blocks, strict=True)
    ]


def _warm_up(subject: Subject, window: float, synchronise: Callable[[], None]) -> int:
    """Run until a block lasts as long as it should; how many steps that are."""
    _block(subject, 1, synchronise)
    steps = 1
    while (spent := _block(subject, steps, synchronise)) < window:
        steps *= 2
    return max(1, round(steps * window / spent))


def _block(subject: Subject, steps: int, synchronise: Callable[[], None]) -> float:
    """Seconds of so many steps."""
    subject.begin()
    try:
        synchronise()
        started = time.perf_counter()
        for _ in range(steps):
            subject.step()
        synchronise()
        return time.perf_counter() - started
    finally:
        subject.end()


def compare(
    timed: Iterable[Samples], comparisons: Iterable[Comparison], seed: int = 0
) -> list[dict[str, Any]]:
    """The ratios whose subjects were all measured, each with a 95 % interval and whether it is as asked for.

    ``reached`` is None where the interval holds the goal.
    """
    by_name = {one.subject: one for one in timed}
    rows = []
    for asked in comparisons:
        if not {asked.subject, *asked.baseline} <= set(by_name):
            continue
        subject, baseline = by_name[asked.subject], _sum([by_name[name] for name in asked.baseline])
        found = (
            compute_speedup(subject, baseline, seed=seed)
            if asked.kind == "rate"
            else compute_speedup(baseline, subject, seed=seed)
        )
        rows.append(
            {
                **asdict(asked),
                "ratio": found.ratio,
                "low": found.low,
                "high": found.high,
                "reached": _reached(asked, found),
            }
        )
    return rows


def _reached(asked: Comparison, found: Speedup) -> bool | None:
    if asked.goal is None or found.low < asked.goal < found.high:
        return None
    return found.ratio >= asked.goal if asked.kind == "rate" else found.ratio <= asked.goal


def _sum(parts: Sequence[Samples]) -> Samples:
    """The times of a round added up."""
    if len(parts) == 1:
        return parts[0]
    samples = np.sum([one.ms for one in parts], axis=0)
    name = " + ".join(one.subject for one in parts)
    return Samples(name, parts[0].threads, [samples[[index]] for index in range(len(samples))])


def rates(timed: Iterable[Samples], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """Images a second: the median over the rounds, a bootstrap 95 % interval of it, and each round's."""
    rows = []
    for one in timed:
        of_round = 1000 / one.ms
        drawn = np.random.default_rng(seed).integers(0, len(of_round), (resamples, len(of_round)))
        low, high = np.percentile(np.median(of_round[drawn], axis=1), [2.5, 97.5])
        rows.append(
            {
                "subject": one.subject,
                "images_per_second": float(np.median(of_round)),
                "low": float(low),
                "high": float(high),
                "rounds": of_round.tolist(),
            }
        )
    return rows


def rates_table(rows: Iterable[Mapping[str, Any]]) -> str:
    return markdown(
        ["subject", "images/s", "95 % interval"],
        [
            [
                row["subject"],
                number(row["images_per_second"]),
                f"{number(row['low'])} to {number(row['high'])}",
            ]
            for row in rows
        ],
    )


def ratios_table(rows: Iterable[Mapping[str, Any]]) -> str:
    said = {True: "yes", False: "no", None: "undecided"}
    return markdown(
        ["ratio", "of", "value", "95 % interval", "goal", "reached"],
        [
            [
                row["text"],
                row["kind"],
                f"{row['ratio']:.2f}",
                f"{row['low']:.2f} to {row['high']:.2f}",
                "" if row["goal"] is None else f"{'≥' if row['kind'] == 'rate' else '≤'} {row['goal']:.2f}",
                "" if row["goal"] is None else said[row["reached"]],
            ]
            for row in rows
        ],
    )


def number(value: float) -> str:
    """Three digits at least: 12.3, 123, 1234."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
