"""How int8 was found: every candidate's accuracy against its latency, what still runs in float, recovery."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from ...runs.results import Int8Search, Report, TriedInt8
from .. import budget, format
from ..pictures import measure_title
from ..scatter import Level, Point, Scatter, Series, scatter
from ..networks import measure
from ..tables import Table

LEARNED = "learned"
"""The candidate of quantization-aware training."""

WORDS = ("no.", "candidate", "result", "calibration", "also")
"""Columns of words."""


@dataclass(frozen=True)
class Target:
    """The search for one target; ``chart`` is None where nothing could be timed."""

    title: str
    text: str
    chart: Scatter | None
    tried: Table
    folded: list[Table]


@dataclass(frozen=True)
class Section:
    targets: list[Target]
    recovery: Table
    recovery_text: str


def section(report: Report) -> Section:
    """Empty where no int8 file was looked for."""
    return Section([_target(report, one) for one in report.int8], recovery(report), recovery_text(report))


def _target(report: Report, search: Int8Search) -> Target:
    return Target(
        title=f"For {search.target}",
        text=" ".join(sentences(report, search)),
        chart=chart(report, search),
        tried=tried(report, search),
        folded=[worst(search), float_parts(search)],
    )


def sentences(report: Report, search: Int8Search) -> list[str]:
    """Which candidate ships and why, what it gives on test images, and what could not be measured."""
    found = [budget.keeps(report, search)]
    if any(one.lost > search.max_drop and one.holds for one in search.tried):
        found.append("A larger loss is not refused where it is of one or two images.")
    if search.file is not None and search.test_score is not None:
        score = search.test_score
        told = f"{search.file} has {format.percent(score.percent, score.n)} "
        told += f"({format.percent_interval(score.low, score.high, score.n)}) of "
        told += format.counted(score.n, "test image")
        if report.student is not None and (fp32 := report.student.score) is not None:
            told += f", fp32 {format.percent(fp32.percent, fp32.n)}"
        found.append(f"{told}.")
    if search.not_timed is not None:
        found.append(f"Its latency is unknown: {search.not_timed}.")
    if search.slow is not None:
        found.append(f"{search.slow[:1].upper()}{search.slow[1:]}")
    return found


def chart(report: Report, search: Int8Search) -> Scatter | None:
    """Accuracy on the images that decide over the median on one thread; a number is the table's."""

    def series(label: str, key: str, of: Callable[[TriedInt8], bool]) -> Series:
        points = [
            Point(
                str(number), one.p50, one.score, f"{number} {one.name}: {_said(one.score, one.p50, search)}"
            )
            for number, one in enumerate(search.tried, 1)
            if of(one) and one.p50 is not None
        ]
        return Series(label, key, points, joined=False)

    ships = budget.shipping(search)
    candidates = [
        series("refused", "refused", lambda one: not one.holds),
        series("keeps within the budget", "holds", lambda one: one.holds and not one.ships),
        series(f"ships: {ships.name}" if ships else "ships", "student_int8", lambda one: one.ships),
    ]
    if not any(one.points for one in candidates):
        return None
    floats = []
    if search.p50_fp32 is not None:
        told = f"fp32: {_said(search.fp32_score, search.p50_fp32, search)}"
        floats = [Point("fp32", search.p50_fp32, search.fp32_score, told)]
    return scatter(
        f"{measure_title(report)} over latency",
        [Series("fp32", "student", floats, joined=False), *candidates],
        x_name="median ms an image, 1 thread",
        note=f"{budget.images(search)}; numbers as in the table",
        levels=_levels(search),
        share_labels=True,
    )


def _said(score: float, p50: float, search: Int8Search) -> str:
    return f"{format.percent(score, search.n)} at {format.milliseconds(p50)}"


def _levels(search: Int8Search) -> list[Level]:
    """The fp32 file's accuracy, and the budget below it."""
    least = search.fp32_score - search.max_drop
    if not search.max_drop:
        return [Level("fp32: no less is allowed", least, "budget", above=False)]
    told = f"budget {format.percent(least, search.n)}"
    return [
        Level(f"fp32 {format.percent(search.fp32_score, search.n)}", search.fp32_score, "student"),
        Level(told, least, "budget", above=False),
    ]


def tried(report: Report, search: Int8Search) -> Table:
    """fp32, then a row for each candidate in the order they were tried."""
    fp32 = {
        "candidate": "fp32",
        "result": format.MISSING if search.file is not None else "ships",
        measure(report): format.percent(search.fp32_score, search.n),
        "1 thread": format.milliseconds(search.p50_fp32),
        "file": format.megabytes(report.student.bytes if report.student is not None else None),
    }
    candidates = [_row(report, number, one, search) for number, one in enumerate(search.tried, 1)]
    # What no candidate has, such as float islands or a time, needs no column.
    columns = [
        name
        for name in (candidates[0] if candidates else {})
        if any(row[name] != format.MISSING for row in candidates)
    ]
    rows = [[row.get(name, format.MISSING) for name in columns] for row in (fp32, *candidates)]
    note = (
        f"{measure_title(report)} on {budget.images(search)}. SQNR: the signal-to-noise ratio of the logits "
        "against fp32."
    )
    if "McNemar’s p" in columns:
        note += " McNemar’s test is the exact one, against fp32."
    if any(one.speedup is not None for one in search.tried):
        note += " Speed: ratio of the medians with its 95 % interval, paired."
    left = sum(name in WORDS for name in columns)
    return Table("Candidates", columns, rows if columns else [], note=note, left=left)


def _row(report: Report, number: int, one: TriedInt8, search: Int8Search) -> dict[str, str]:
    also = [("equalised", one.equalised), ("biases corrected", one.bias_corrected)]
    speed = format.MISSING
    if one.speedup is not None:
        speed = format.times(one.speedup.ratio)
        speed += f" ({format.times_interval(one.speedup.low, one.speedup.high)})"
    return {
        "no.": str(number),
        "candidate": one.name,
        "result": "ships" if one.ships else "holds" if one.holds else "refused",
        "calibration": one.calibration,
        "also": ", ".join(name for name, done in also if done) or format.MISSING,
        "kept float": f"{len(one.kept_float):,}" if one.kept_float else format.MISSING,
        measure(report): format.percent(one.score, search.n),
        "against fp32": budget.change(one.lost, search.n),
        "McNemar’s p": format.MISSING if one.p is None else probability(one.p),
        "SQNR": decibels(one.sqnr),
        "1 thread": format.milliseconds(one.p50),
        "of fp32’s speed": speed,
        "file": format.megabytes(one.bytes),
    }


def probability(p: float) -> str:
    """0.63, 0.041, 1; below 0.001 that it is."""
    return "< 0.001" if p < 0.001 else "1" if p > 0.995 else format.significant(p, 2)


def decibels(sqnr: float) -> str:
    return "no error" if sqnr == inf else f"{format.significant(sqnr)} dB"


def worst(search: Int8Search) -> Table:
    rows = [[name, decibels(sqnr)] for name, sqnr in search.worst]
    note = "Signal-to-noise ratio of the logits when this tensor alone is rounded: the worst first."
    title = f"Roundings that cost most, {search.target}"
    return Table(title, ["tensor", "SQNR"], rows, code=frozenset({0}), note=note)


def float_parts(search: Int8Search) -> Table:
    rows = [[one.name, one.op_type, one.why] for one in search.float_parts]
    note = "Nodes of the graph as ONNX Runtime runs it on this machine, in their order."
    title = f"What still runs in float, {search.target}"
    return Table(title, ["node", "operator", "why"], rows, code=frozenset({0, 1}), note=note, text=True)


def recovery(report: Report) -> Table:
    """The network as it was trained to be, and its file, on the same images."""
    found, search = report.recovery, budget.first(report)
    if found is None:
        return Table("Recovery", [], [])
    learned = next((one for one in search.tried if one.name == LEARNED), None) if search else None
    rows = []
    if found.fake_select is not None:
        file, n = None, None
        if search is not None and search.role == "val":
            n = search.n
            file = learned.score if learned is not None else None
        rows.append(_compared("val", n, found.fake_select, file))
    if found.fake_test is not None:
        score = report.student_int8.score if report.student_int8 is not None else None
        ships = learned is not None and learned.ships
        file = score.percent if ships and score is not None else None
        rows.append(_compared("test", score.n if score else None, found.fake_test, file))
    columns = ["", "images", "under fake quantization", "the learned int8 file", "difference"]
    note = f"{measure_title(report)}: in torch as in training, and of the file in ONNX Runtime."
    return Table("Recovery", columns, rows, note=note)


def _compared(role: str, n: int | None, fake: float, file: float | None) -> list[str]:
    difference = format.MISSING if file is None else format.points(round(file - fake, 6) + 0.0, n)
    return [role, format.count(n), format.percent(fake, n), format.percent(file, n), difference]


def recovery_text(report: Report) -> str:
    found, search = report.recovery, budget.first(report)
    if found is None:
        return ""
    told = f"With --qat the student learned on for {format.counted(found.epochs, 'epoch')} "
    told += "as the int8 network that it will be."
    ships = budget.shipping(search) if search is not None else None
    if search is None:
        return told
    if ships is None:
        return (
            f"{told} It did not keep within the budget either, so no test accuracy of its file was measured."
        )
    if ships.name != LEARNED:
        return (
            f"{told} Another candidate ships, {ships.name}, "
            "so on the test images the learned one’s file was not measured."
        )
    return f"{told} It ships."
