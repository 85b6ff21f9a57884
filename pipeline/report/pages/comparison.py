"""The page of a comparison: what is best and what is noise, one picture for each set of images, one table."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...api.compare import points
from ...evaluation.results import AccuracyDifference, ComparedFile, ComparedRun, Comparison, Group, Machine
from .. import format
from ..tables import Table
from ..tradeoff import Spot, Tradeoff, tradeoff
from ..validation_tables import p_value
from ..render import as_html, as_markdown

KEYS = {"int8": "student_int8", "fp32": "student", "teacher": "teacher"}
LEGEND = [("student_int8", "student, int8"), ("student", "student, fp32"), ("teacher", "teacher")]


@dataclass(frozen=True)
class Section:
    """Runs of one set of images."""

    id: str
    title: str
    sentences: list[str]
    pictures: list[Tradeoff]
    table: Table


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    warnings: list[str]
    sections: list[Section]
    notes: list[str]
    sources: Table
    command: str
    footer: str


def pages(found: Comparison) -> dict[str, str]:
    """File name -> the page, as HTML and as Markdown; every text is escaped."""
    shown = page(found)
    return {
        "comparison.html": as_html("comparison.html.j2", shown),
        "comparison.md": as_markdown("comparison.md.j2", shown),
    }


def page(found: Comparison) -> Page:
    """What the page shows, in reading order."""
    return Page(
        title=found.title,
        lead="What each run’s files gave on its test images, in ONNX Runtime, and what they cost. Int8 and "
        "fp32 are one student’s two files; the int8 file ships where there is one.",
        warnings=found.warnings,
        sections=[_section(found, group, number) for number, group in enumerate(found.groups, 1)],
        notes=found.notes,
        sources=_sources(found),
        command=found.command,
        footer="questpress. The same content is in comparison.html, comparison.md, comparison.csv and "
        "comparison.json.",
    )


def _section(found: Comparison, group: Group, number: int) -> Section:
    title = f"On {group.data}" if group.data else "Without data yet"
    if group.n:
        title += f", {format.counted(group.n, 'test image')}"
    return Section(
        id=f"group-{number}",
        title=title,
        sentences=sentences(found, group),
        pictures=[
            picture for machine in group.machines if (picture := _picture(found, group, machine)) is not None
        ],
        table=table(found, group),
    )


def measure(found: Comparison, group: Group) -> str:
    scores = [one.score for name in group.runs for one in _files(found.run(name)) if one.score is not None]
    return scores[0].metric if scores else "accuracy"


def _files(run: ComparedRun) -> list[ComparedFile]:
    return [one for one in (run.int8, run.fp32, run.of_teacher) if one is not None]


def sentences(found: Comparison, group: Group) -> list[str]:
    """Which run is the best, which are within noise of it, and which are slower than the fastest."""
    told = []
    if group.best is not None:
        told.append(_best(found, group))
        within = [one for one in group.accuracies if one.within_noise]
        worse = [one for one in group.accuracies if not one.within_noise]
        if within:
            told.append(f"Within noise of it: {_each(within, group)}.")
        if worse:
            told.append(f"Worse: {_each(worse, group)}.")
    for machine in group.machines:
        told += _speeds(found, machine, many=len(group.machines) > 1)
    return told


def _best(found: Comparison, group: Group) -> str:
    assert group.best is not None
    ships = found.run(group.best).ships
    assert ships is not None and ships.score is not None
    score = ships.score
    interval = format.percent_interval(score.low, score.high, score.n)
    value = f"{format.percent(score.percent, score.n)} (95 % interval {interval})"
    rank = "the most accurate" if group.accuracies else "the only one that was measured"
    return f"{group.best} is {rank}: {measure(found, group)} {value}, {ships.kind}."


def _each(differences: Sequence[AccuracyDifference], group: Group) -> str:
    return "; ".join(f"{one.run} ({in_words(one, group.n)})" for one in differences)


def in_words(one: AccuracyDifference, n: int | None) -> str:
    """−0.8 points, p = 0.512."""
    told = format.points(one.points, n)
    if one.p_holm is None:
        return f"{told}, intervals {'overlap' if one.within_noise else 'apart'}"
    p = p_value(one.p_holm)
    told += f", p {p}" if p.startswith("<") else f", p = {p}"
    return told if one.paired else f"{told}, unpaired"


def _speeds(found: Comparison, machine: Machine, *, many: bool) -> list[str]:
    first = found.run(machine.runs[0]).ships
    assert first is not None
    where = f" on {machine.machine}" if many else ""
    told = [f"Fastest{where}: {machine.runs[0]}, {format.milliseconds(first.p50)}."]
    for verdict, words in (
        ("no difference", "No measurable difference from it"),
        ("slower", "Slower"),
        ("not known", "Slower or not, which a report without intervals does not tell"),
    ):
        some = [one for one in machine.latencies if one.verdict == verdict]
        if some:
            told.append(f"{words}: {', '.join(f'{one.run} ({format.times(one.ratio)})' for one in some)}.")
    return told


def _picture(found: Comparison, group: Group, machine: Machine) -> Tradeoff | None:
    every = points([found.run(name) for name in machine.runs])
    kinds = {one.kind for _, one in every}
    name = measure(found, group)
    return tradeoff(
        f"{name[:1].upper()}{name[1:]} over latency",
        [_spot(name, one, machine) for name, one in every],
        x_name=f"median ms an image, {format.threads(str(found.threads))}",
        note=f"Timed on {machine.machine}.",
        legend=[(key, text) for kind, (key, text) in zip(KEYS, LEGEND, strict=True) if kind in kinds],
    )


def _spot(name: str, file: ComparedFile, machine: Machine) -> Spot:
    assert file.score is not None and file.p50 is not None
    run, _, kind = name.rpartition(" ")
    # The two files of a run differ little: one label is mostly enough.
    fp32 = f"{run} fp32" if name in machine.frontier else ""
    label = {"int8": run, "teacher": run, "fp32": fp32}[kind]
    run = run if kind != "teacher" else ""
    return Spot.of(name, KEYS[kind], file.score, file.p50, file.bytes, label=label, run=run)


def table(found: Comparison, group: Group) -> Table:
    """A row for each run, the most accurate first."""
    against = {one.run: one for one in group.accuracies}
    rows = [_row(found.run(name), against.get(name), group) for name in group.runs]
    title = measure(found, group)
    columns = [
        "run", "method", "teacher", "student", "image", "parameters", "int8 file", "fp32 file",
        f"{title} int8", f"{title} fp32", "to the best", "latency int8", "over teacher", "latency fp32",
        "over teacher", "ECE", "training", "seed", "data",
    ]  # fmt: skip
    return Table("Runs", columns, rows, left=4)


def _row(run: ComparedRun, against: AccuracyDifference | None, group: Group) -> list[str]:
    difference = "best" if run.name == group.best else format.MISSING
    if against is not None:
        difference = f"{in_words(against, group.n)}: {'noise' if against.within_noise else 'worse'}"
    ships = run.ships
    ece = ships.ece if ships is not None else None
    return [
        run.name,
        run.method,
        run.teacher,
        run.student,
        f"{run.image_size} px",
        format.millions(run.parameters),
        format.megabytes(run.int8.bytes if run.int8 else None),
        format.megabytes(run.fp32.bytes if run.fp32 else None),
        _score(run.int8),
        _score(run.fp32),
        difference,
        _p50(run.int8),
        _faster(run.int8),
        _p50(run.fp32),
        _faster(run.fp32),
        format.percent(ece, group.n),
        format.MISSING if run.training_seconds is None else format.duration(run.training_seconds),
        format.MISSING if run.seed is None else str(run.seed),
        format.MISSING if run.fingerprint is None else run.fingerprint[:8],
    ]


def _score(file: ComparedFile | None) -> str:
    if file is None or file.score is None:
        return format.MISSING
    one = file.score
    return f"{format.percent(one.percent, one.n)} ({format.percent_interval(one.low, one.high, one.n)})"


def _p50(file: ComparedFile | None) -> str:
    return format.milliseconds(file.p50 if file is not None else None)


def _faster(file: ComparedFile | None) -> str:
    if file is None or file.speedup is None:
        return format.MISSING
    return (
        f"{format.times(file.speedup.ratio)} ({format.times_interval(file.speedup.low, file.speedup.high)})"
    )


def _sources(found: Comparison) -> Table:
    rows = [
        [one.name, one.source, one.machine or format.MISSING, one.fingerprint or format.MISSING]
        for one in found.runs
    ]
    columns = ["run", "where", "timed on", "data’s fingerprint"]
    return Table("Where they are", columns, rows, code=frozenset({1, 3}), text=True)
