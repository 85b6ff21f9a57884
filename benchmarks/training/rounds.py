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


def do_nothing() -> None:
    pass


@dataclass(frozen=True)
class Subject:
    """Something that trains. A ``step`` takes ``images`` images and may leave work running on the device.

    ``begin`` and ``end`` are called around each of its blocks, untimed: worker processes of the subject pause
    between its blocks, so that they neither disturb the others nor work ahead.
    """

    name: str
    images: int
    step: Callable[[], Any]
    begin: Callable[[], None] = do_nothing
    end: Callable[[], None] = do_nothing


@dataclass(frozen=True)
class Comparison:
    """A row of the table of ratios: how much time ``subject`` takes, or how high its rate is.

    ``baseline`` names what it is compared with; of several the times are added. ``goal`` is the most time or
    the least rate to reach.
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
    synchronize: Callable[[], None] = do_nothing,
    log: Callable[[str], None] = lambda _: None,
) -> list[Samples]:
    """Return milliseconds per image of each subject, one sample a round.

    Args:
        seconds: of timed steps for each subject, about; a block has at least one step.
        threads: what the process was given; recorded.
        synchronize: waits for the device.
    """
    steps = []
    for subject in subjects:
        log(f"warming up {subject.name}")
        steps.append(_warm_up(subject, seconds / rounds, synchronize))
    blocks: list[list[np.ndarray]] = [[] for _ in subjects]
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for index in rng.permutation(len(subjects)):
            spent = _block(subjects[index], steps[index], synchronize)
            blocks[index].append(np.array([1000 * spent / (steps[index] * subjects[index].images)]))
    return [
        Samples(subject.name, threads, of_subject)
        for subject, of_subject in zip(subjects, blocks, strict=True)
    ]


def _warm_up(subject: Subject, window: float, synchronize: Callable[[], None]) -> int:
    """Run until a block lasts as long as it should; return its number of steps."""
    _block(subject, 1, synchronize)
    steps = 1
    while (spent := _block(subject, steps, synchronize)) < window:
        steps *= 2
    return max(1, round(steps * window / spent))


def _block(subject: Subject, steps: int, synchronize: Callable[[], None]) -> float:
    """Return the seconds of a number of steps."""
    subject.begin()
    try:
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            subject.step()
        synchronize()
        return time.perf_counter() - started
    finally:
        subject.end()


def compare(
    timed: Iterable[Samples], comparisons: Iterable[Comparison], seed: int = 0
) -> list[dict[str, Any]]:
    """Return the ratios whose subjects were all measured, each with a 95 % interval and its goal.

    ``reached`` is None if the interval holds the goal.
    """
    by_name = {samples.subject: samples for samples in timed}
    rows = []
    for comparison in comparisons:
        if not {comparison.subject, *comparison.baseline} <= set(by_name):
            continue
        subject, baseline = by_name[comparison.subject], _sum([by_name[name] for name in comparison.baseline])
        speedup = (
            compute_speedup(subject, baseline, seed=seed)
            if comparison.kind == "rate"
            else compute_speedup(baseline, subject, seed=seed)
        )
        rows.append(
            {
                **asdict(comparison),
                "ratio": speedup.ratio,
                "low": speedup.low,
                "high": speedup.high,
                "reached": _reached(comparison, speedup),
            }
        )
    return rows


def _reached(comparison: Comparison, speedup: Speedup) -> bool | None:
    if comparison.goal is None or speedup.low < comparison.goal < speedup.high:
        return None
    return speedup.ratio >= comparison.goal if comparison.kind == "rate" else speedup.ratio <= comparison.goal


def _sum(parts: Sequence[Samples]) -> Samples:
    """Add up the times of each round."""
    if len(parts) == 1:
        return parts[0]
    samples = np.sum([part.ms for part in parts], axis=0)
    name = " + ".join(part.subject for part in parts)
    return Samples(name, parts[0].threads, [samples[[index]] for index in range(len(samples))])


def rates(timed: Iterable[Samples], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """Return images per second: median over the rounds, bootstrap 95 % interval, and each round."""
    rows = []
    for samples in timed:
        of_round = 1000 / samples.ms
        drawn = np.random.default_rng(seed).integers(0, len(of_round), (resamples, len(of_round)))
        low, high = np.percentile(np.median(of_round[drawn], axis=1), [2.5, 97.5])
        rows.append(
            {
                "subject": samples.subject,
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
    labels = {True: "yes", False: "no", None: "undecided"}
    return markdown(
        ["ratio", "of", "value", "95 % interval", "goal", "reached"],
        [
            [
                row["text"],
                row["kind"],
                f"{row['ratio']:.2f}",
                f"{row['low']:.2f} to {row['high']:.2f}",
                "" if row["goal"] is None else f"{'≥' if row['kind'] == 'rate' else '≤'} {row['goal']:.2f}",
                "" if row["goal"] is None else labels[row["reached"]],
            ]
            for row in rows
        ],
    )


def number(value: float) -> str:
    """Format with three digits at least: 12.3, 123, 1234."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
