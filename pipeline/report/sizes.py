"""The report of students of several image sizes: what each gives over what it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runs.files import write_text
from ..runs.results import Resolutions, Size, Subject
from . import format
from .scatter import Point, Scatter, Series, scatter
from .tables import Table
from .render import as_html, as_markdown

ASIDE = ("GMACs", "Size", "faster than the largest")
"""Columns of the table that a terminal has no room for."""

KINDS = (("student_int8", "int8"), ("student", "fp32"))


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    machine: str
    charts: list[Scatter]
    table: Table
    files: Table
    command: str


def write(found: Resolutions, folder: Path) -> None:
    """Write report.html and report.md into ``folder``, each whole or not at all."""
    shown = page(found)
    write_text(folder / "report.html", as_html("sizes.html.j2", shown))
    write_text(folder / "report.md", as_markdown("sizes.md.j2", shown))


def page(found: Resolutions) -> Page:
    """What the page shows, in reading order."""
    return Page(
        title=found.title,
        lead=_lead(found),
        machine=_machine(found),
        charts=[chart for chart in (*_latencies(found), _gmacs(found)) if chart is not None],
        table=table(found),
        files=_files(found),
        command=found.command,
    )


def _lead(found: Resolutions) -> str:
    sides = ", ".join(str(one.size) for one in reversed(found.sizes))
    told = (
        f"The teacher {found.teacher.name} sees {found.teacher_image_size} × {found.teacher_image_size} "
        f"pixels, each student the same crops scaled down to {sides}."
    )
    if found.method == "none":
        told = f"Students of {sides} pixels, trained without a teacher."
    told += " Accuracy is that of the files that ship, on the test images; all files were timed together."
    without = [f"{one.size} px" for one in found.sizes if one.student_int8 is None]
    if without:
        told += f" No int8 file kept within the budget at {', '.join(without)}: the fp32 file ships there."
    return told


def _machine(found: Resolutions) -> str:
    machine = found.environment
    return f"{machine['cpu']}, {format.counted(int(machine['cores allowed']), 'core')} allowed"


def _series(
    found: Resolutions, x: Callable[[Size, Subject], float | None], told: Callable[[float], str]
) -> list[Series]:
    series = []
    for key, name in KINDS:
        points = []
        for one in found.sizes:
            subject: Subject | None = getattr(one, key)
            if subject is None:
                continue
            cost, score = x(one, subject), subject.score
            if cost is None or score is None:
                continue
            text = f"{one.size} px {format.percent(score.percent, score.n)} at {told(cost)}"
            # The two files of a size differ little: one label is enough.
            label = str(one.size) if key == KINDS[0][0] or one.student_int8 is None else ""
            points.append(Point(label, cost, score.percent, text, score.low, score.high))
        series.append(Series(name, key, points))
    return series


def _latencies(found: Resolutions) -> list[Scatter | None]:
    def p50(threads: int) -> Callable[[Size, Subject], float | None]:
        def of(_: Size, subject: Subject) -> float | None:
            measured = subject.latency_ms.get(str(threads))
            return measured.p50 if measured else None

        return of

    return [
        scatter(
            f"{_measure(found)} over latency, {format.threads(str(threads))}",
            _series(found, p50(threads), format.milliseconds),
            x_name="median ms an image",
            note="with 95 % intervals",
        )
        for threads in found.threads
    ]


def _gmacs(found: Resolutions) -> Scatter | None:
    return scatter(
        f"{_measure(found)} over arithmetic",
        _series(found, lambda one, _: one.gmacs, lambda gmacs: f"{format.significant(gmacs)} GMACs"),
        x_name="billions of multiply-adds an image",
        note="with 95 % intervals",
    )


def table(found: Resolutions) -> Table:
    """A row for each file, the largest size first, and the teacher at the end."""
    counts = [str(count) for count in found.threads]
    columns = ["Student", "File", _measure(found), "95 % interval", "GMACs", "Size"]
    columns += [f"{format.threads(count)}, median" for count in counts]
    columns += ["faster than the largest"]
    rows = []
    for one in found.sizes:
        for key, name in KINDS:
            subject: Subject | None = getattr(one, key)
            if subject is None:
                continue
            gmacs = format.MISSING if one.gmacs is None else format.significant(one.gmacs)
            rows.append(
                [f"{one.size} px", name, *_accuracy(subject), gmacs, format.megabytes(subject.bytes)]
                + [_p50(subject, count) for count in counts]
                + [_faster(subject, found.threads)]
            )
    dashes = [format.MISSING] * (len(columns) - 4)
    rows.append([f"teacher, {found.teacher_image_size} px", "torch", *_accuracy(found.teacher), *dashes])
    return Table("Sizes", columns, rows, left=2)


def _accuracy(subject: Subject) -> Sequence[str]:
    score = subject.score
    if score is None:
        return format.MISSING, format.MISSING
    interval = format.percent_interval(score.low, score.high, score.n)
    return format.percent(score.percent, score.n), interval


def _measure(found: Resolutions) -> str:
    return format.title(found.teacher.score.metric) if found.teacher.score is not None else "Accuracy"


def _p50(subject: Subject, count: str) -> str:
    measured = subject.latency_ms.get(count)
    return format.milliseconds(measured.p50 if measured else None)


def _faster(subject: Subject, threads: Sequence[int]) -> str:
    """On the most threads, with the paired interval."""
    measured = [one for one in subject.speedups if one.threads == max(threads)]
    if not measured:
        return format.MISSING
    [one] = measured
    return f"{format.times(one.ratio)} ({format.times_interval(one.low, one.high)}), {one.verdict}"


def _files(found: Resolutions) -> Table:
    rows = [[f"{one.size} px", f"{one.folder}/report.html", f"{one.folder}/artifact"] for one in found.sizes]
    columns = ["Student", "its own report", "what ships"]
    return Table("Run folders", columns, rows, code=frozenset({1, 2}), text=True)
