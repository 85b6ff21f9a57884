"""The section on latency: a picture of how steady each network is, and all that a bench has measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from ....export.latency.results import Latency
from ...runs.bench_results import Bench
from ...runs.results import Report
from .. import bench_tables, format
from ..charts import LABEL, VALUE, WIDTH, Tick, nice, ticks
from ..tables import Table

ROW = 40
CURVE = 26
"""Height of a row's hill."""
BINS = 40
WIDEST = 3.0
"""The picture ends at three times the median at most; what is slower is counted beside it."""


@dataclass(frozen=True)
class Hill:
    """One network's runs as a shape over its median: ``outline`` are the points of an SVG polygon."""

    label: str
    key: str
    y: float
    outline: str
    text: str
    beyond: str
    p90: float | None


@dataclass(frozen=True)
class Hills:
    """The distribution of one thread count's runs, each over its own median."""

    title: str
    description: str
    height: float
    rows: list[Hill]
    ticks: list[Tick]
    median_x: float
    note: str


@dataclass(frozen=True)
class Section:
    """Empty of a run without a bench, and of an older one."""

    pictures: list[Hills] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    command: str = ""


def section(report: Report) -> Section:
    return Section() if report.bench is None else of_bench(report.bench)


def of_bench(bench: Bench) -> Section:
    pictures = [picture for count in bench.threads if (picture := hills(bench, count)) is not None]
    return Section(
        pictures=pictures,
        text=protocol(bench),
        flags=flags(bench),
        tables=[
            bench_tables.percentiles(bench),
            bench_tables.speedups(bench),
            bench_tables.end_to_end(bench),
            bench_tables.cold_starts(bench),
            bench_tables.throughput(bench),
        ],
        folded=[bench_tables.conditions(bench), bench_tables.files(bench), bench_tables.machine(bench)],
        command=bench.command,
    )


def flags(bench: Bench) -> list[str]:
    """What disturbed it, each with its thread count; then what could not be measured."""
    found = [
        f"{format.threads(str(one.threads)).capitalize()}, {one.name}: {one.sentence}" for one in bench.flags
    ]
    return [*found, *(f"{note[0].upper()}{note[1:]}." for note in bench.notes)]


def protocol(bench: Bench) -> list[str]:
    """In three sentences."""
    processes = max(one.processes for one in bench.conditions)
    pinned = any(one.cores for one in bench.conditions)
    runs = f" and {bench.samples:,} runs" if bench.samples else ""
    each = "process of its own" if processes == 1 else f"{processes} processes of its own, which take turns"
    blocks = format.significant(max(one.block_ms for one in bench.conditions))
    return [
        f"Every file ran in {'a ' if processes == 1 else ''}{each}, "
        + ("pinned to as many cores as it has threads" if pinned else "not pinned, since this system cannot")
        + f", for at least {format.significant(bench.seconds)} s{runs} at each thread count, one image at a "
        "time, after a warm-up until two windows agreed within 2 %.",
        f"Rounds of blocks of {blocks} ms in random order (seed {bench.seed}); no run was left out.",
        disturbed(bench),
    ]


def disturbed(bench: Bench) -> str:
    if bench.flags:
        names = ", ".join(dict.fromkeys(one.name for one in bench.flags))
        return f"The machine was not quiet ({names}): doubt small differences."
    return "A sentinel, the machine’s counters and repeated processes showed nothing that disturbed it."


def hills(bench: Bench, threads: int) -> Hills | None:
    """A row for each network: how its runs lie around their median."""
    shown = [one for one in bench.latencies if one.threads == threads and one.p50]
    if not shown:
        return None
    ratios = {one.subject: np.array(one.quantiles) / (one.p50 or 1.0) for one in shown}
    low = max(0.5, min(float(one[1]) for one in ratios.values()))
    high = min(WIDEST, max(1.15, *(float(one[99]) for one in ratios.values())))
    step = nice((high - low) / 4)
    left, right = LABEL + 6, WIDTH - VALUE

    def place(ratio: float) -> float:
        return round(left + (right - left) * (ratio - low) / (high - low), 1)

    rows = [
        _hill(bench, one, ratios[one.subject], (low, high), place(low), place(high), 8 + i * ROW)
        for i, one in enumerate(shown)
    ]
    begin = step * np.ceil(low / step)
    marked = [Tick(place(value), f"{text}×") for value, text in ticks(float(begin), high, step)]
    return Hills(
        title=f"How steady, {format.threads(str(threads))}",
        description=_told(bench, threads, shown),
        height=8 + len(rows) * ROW + 20,
        rows=rows,
        ticks=marked,
        median_x=place(1.0),
        note="single runs around their median, which stands at the right",
    )


def _hill(
    bench: Bench,
    one: Latency,
    ratios: np.ndarray,
    ends: tuple[float, float],
    left: float,
    right: float,
    top: float,
) -> Hill:
    edges = np.linspace(*ends, BINS + 1)
    # Quantiles are a distribution function read sideways; equal ones would make it vertical.
    rising = ratios + 1e-9 * np.arange(len(ratios))
    share = np.interp(edges, rising, np.arange(101) / 100)
    heights = np.diff(share)
    heights = heights / (heights.max() or 1.0)
    base, width = top + CURVE, (right - left) / BINS
    points = [(left, base)]
    for i, height in enumerate(heights):
        y = base - CURVE * float(height)
        points += [(left + i * width, y), (left + (i + 1) * width, y)]
    points.append((right, base))
    beyond = 1 - float(share[-1])
    p90 = one.percentiles.get("p90")
    ratio = p90.value / (one.p50 or 1.0) if p90 is not None else None
    return Hill(
        label=bench_tables.role(bench, one.subject),
        key=next((s.key for s in bench.subjects if s.name == one.subject and s.key), "") or "other",
        y=round(base, 1),
        outline=" ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        text=format.milliseconds(one.p50),
        beyond=f"{format.percent(100 * beyond)} beyond" if beyond >= 0.005 else "",
        p90=round(left + (right - left) * (ratio - ends[0]) / (ends[1] - ends[0]), 1)
        if ratio is not None and isfinite(ratio) and ends[0] <= ratio <= ends[1]
        else None,
    )


def _told(bench: Bench, threads: int, shown: Sequence[Latency]) -> str:
    """The picture in words, for those who hear it."""
    rows = []
    for one in shown:
        p90 = one.percentiles.get("p90")
        over = f", p90 {format.milliseconds(p90.value)}" if p90 is not None else ""
        rows.append(f"{bench_tables.role(bench, one.subject)}: median {format.milliseconds(one.p50)}{over}")
    return f"Distribution of single runs on {format.threads(str(threads))}. {'; '.join(rows)}."
