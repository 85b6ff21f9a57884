"""Calibration in the report: reliability diagrams, a table, and sentences."""

from collections.abc import Sequence

from ...runs.results import Report
from ...runs.scores import Calibration, Proportion, ReliabilityBin
from .. import format
from ..charts import WIDTH, Chart, Drawing, Shape, circle, linear_scale, path, rectangle, text, y_axis
from ..networks import Column, all_networks, compared_networks, shipped_network
from ..page import Section
from ..tables import Table

LEFT, TOP, SIDE = 46, 8, 236
BARS_TOP, BARS_HEIGHT = TOP + SIDE + 12, 34
"""Bars below the diagram show the number of predictions of each bin."""
HEIGHT = BARS_TOP + BARS_HEIGHT + 34
INSET = 6
"""Distance of 0 and 100 % from the edges of the diagram."""

x = linear_scale(0, 100, LEFT + INSET, LEFT + SIDE - INSET)
y = linear_scale(0, 100, TOP + SIDE - INSET, TOP + INSET)
"""Positions of a confidence and of an accuracy."""


def section(report: Report) -> Section:
    columns = compared_networks(report)
    text = [*describe_all(columns), *_temperature(report)]
    note = "Teachers were measured in PyTorch, students on their ONNX files."
    return calibration_section(columns, all_networks(report), text, note)


def calibration_section(
    columns: Sequence[Column], all_columns: Sequence[Column], sentences: Sequence[str], note: str = ""
) -> Section:
    """Return diagrams of ``columns`` and a table of ``all_columns``; empty if none was measured."""
    measured = [(column, c) for column in columns if (c := column.subject.calibration)]
    charts = [reliability_diagram(column, c) for column, c in measured]
    has_before = any(c.before for _, c in measured)
    caption = "Each dot is a bin of confidence: its accuracy over its mean confidence, with the 95 % "
    caption += "interval. Dashed diagonal: perfect calibration; below it the network is overconfident. "
    caption += "Rings: the same file without temperature scaling. " if has_before else ""
    caption += "Bars: number of predictions."
    return Section(
        "Calibration",
        "calibration",
        text=[" ".join(sentences), caption] if charts else [],
        figures=charts,
        tables=[calibration_table(all_columns, note)],
    )


def describe_all(columns: Sequence[Column]) -> list[str]:
    return [describe(column, c) for column in columns if (c := column.subject.calibration) is not None]


def describe(column: Column, calibration: Calibration) -> str:
    """Teacher: mean confidence 92.0 %, accuracy 88.0 %, overconfident by 4.0 points."""
    confidence = format.percent(calibration.confidence, calibration.n)
    accuracy = format.percent(calibration.accuracy, calibration.n)
    return f"{column.role}: mean confidence {confidence}, accuracy {accuracy}, {verdict(calibration)}."


def verdict(calibration: Calibration) -> str:
    gap = calibration.confidence - calibration.accuracy
    size = format.points(abs(gap), calibration.n)[1:]
    if calibration.gap_low > 0:
        return f"overconfident by {size}"
    if calibration.gap_high < 0:
        return f"underconfident by {size}"
    return f"no significant difference on {format.plural(calibration.n, 'image')}"


def _temperature(report: Report) -> list[str]:
    fit, shipped = report.temperature, shipped_network(report)
    if fit is None:
        return []
    sentence = f"The exported logits are divided by a temperature of {fit.value:.2f}, fitted on "
    sentence += format.plural(fit.n, "validation image")
    if fit.low is not None and fit.high is not None:
        sentence += f" (95 % interval {fit.low:.2f}–{fit.high:.2f})"
    before = shipped.subject.calibration.before if shipped and shipped.subject.calibration else None
    if shipped is not None and before is not None:
        sentence += f"; without it the {shipped.role_in_sentence} has a mean confidence of "
        sentence += f"{format.percent(before.confidence, before.n)} and an ECE of "
        sentence += format.percent(before.ece, before.n)
    return [f"{sentence}."]


def terminal_line(report: Report) -> str | None:
    """Return the ECE of each network, and before an arrow its ECE without temperature scaling."""
    parts = []
    for column in compared_networks(report):
        if (measured := column.subject.calibration) is not None:
            before = f"{format.percent(measured.before.ece, measured.n)} → " if measured.before else ""
            parts.append(f"{column.role_in_sentence} {before}{format.percent(measured.ece, measured.n)}")
    return f"ECE: {', '.join(parts)}" if parts else None


def calibration_table(columns: Sequence[Column], note: str = "") -> Table:
    """Return a row for each network, and one for each exported file without temperature scaling."""
    rows = []
    for column in columns:
        if (measured := column.subject.calibration) is not None:
            rows.append(_row(column.role, measured))
            if measured.before is not None:
                rows.append(_row(f"{column.role}, no temperature scaling", measured.before))
    note = (
        "ECE: expected calibration error, 15 bins. Its interval is a bootstrap over images and starts at 0 "
        f"if a calibrated network would often have this ECE. Entropy and NLL in nats. {note}"
    )
    heads = ["", "ECE", "95 % interval", "mean confidence", "accuracy", "entropy", "NLL", "images"]
    return Table("Calibration", heads, rows, note=note.strip())


def _row(name: str, measured: Calibration) -> list[str]:
    n = measured.n
    return [
        name,
        format.percent(measured.ece, n),
        format.percent_interval(measured.ece_low, measured.ece_high, n),
        format.percent(measured.confidence, n),
        format.percent(measured.accuracy, n),
        format.significant(measured.entropy),
        format.significant(measured.nll),
        format.count(n),
    ]


def reliability_diagram(column: Column, calibration: Calibration) -> Chart:
    n, key = calibration.n, column.key
    note = f"ECE {format.percent(calibration.ece, n)} "
    note += f"({format.percent_interval(calibration.ece_low, calibration.ece_high, n)})"
    filled = [part for part in calibration.bins if part.n]
    before = calibration.before.bins if calibration.before is not None else []
    ticks = [(value, f"{value:g}") for value in (0.0, 25.0, 50.0, 75.0, 100.0)]
    shapes = [
        *y_axis(ticks, y, LEFT, LEFT + SIDE),
        *(text("tick", x(value), HEIGHT - 18, number, "middle") for value, number in ticks),
        text("tick axis", LEFT + SIDE, HEIGHT - 3, "confidence, %", "end"),
        path("diagonal", "M", x(0), y(0), "L", x(100), y(100)),
        *_count_bars(filled, key),
        *(_dot(part, key, "ring", "no temperature scaling: ") for part in before if part.n),
        *(shape for part in filled for shape in (_whisker(part, key), _dot(part, key, "dot"))),
    ]
    description = f"Reliability diagram of the {column.role_in_sentence}, {note}. "
    description += f"{'; '.join(_describe_bin(part) for part in filled)}."
    return Chart(column.role, description, [Drawing(WIDTH, HEIGHT, shapes)], note)


def _describe_bin(part: ReliabilityBin) -> str:
    predictions = format.plural(part.n, "prediction")
    return f"{predictions} at {format.percent(part.confidence)}, accuracy {format.percent(part.accuracy)}"


def _whisker(part: ReliabilityBin, key: str) -> Shape:
    assert part.confidence is not None and part.accuracy is not None
    interval = Proportion.from_counts(round(part.n * part.accuracy / 100), part.n)
    return path(f"whisker {key}", "M", x(part.confidence), y(interval.low), "V", y(interval.high))


def _dot(part: ReliabilityBin, key: str, css: str, note: str = "") -> Shape:
    assert part.confidence is not None and part.accuracy is not None
    tooltip = f"{note}{_describe_bin(part)}"
    return circle(f"{css} {key}", x(part.confidence), y(part.accuracy), 4, tooltip)


def _count_bars(filled: Sequence[ReliabilityBin], key: str) -> list[Shape]:
    most = max((part.n for part in filled), default=1)
    shapes = []
    for part in filled:
        left, right, height = x(part.low) + 1, x(part.high) - 1, max(BARS_HEIGHT * part.n / most, 1)
        shapes.append(rectangle(f"bar {key}", left, BARS_TOP + BARS_HEIGHT - height, right - left, height))
    return shapes
