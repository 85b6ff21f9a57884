"""The networks of a run next to each other: accuracy over latency, size, accuracy, latency."""

from functools import partial

from ...runs.results import Report
from .. import format
from ..charts import Chart, Mark, bars, dots
from ..networks import (
    Column,
    all_networks,
    compared_networks,
    median_latency,
    score_name,
    score_rows,
    thread_counts,
)
from ..page import Section
from ..scatter import Point, describe_point, scatter
from ..tables import Attribute, Table, attribute_rows

TITLE = "Comparison"


def section(report: Report) -> Section:
    return Section(
        TITLE,
        "comparison",
        figures=[accuracy_over_latency(report), *bar_charts(report)],
        tables=[comparison_table(report)],
    )


def accuracy_over_latency(report: Report) -> Chart | None:
    """Draw the networks at the smallest thread count; None unless two of them were measured."""
    for threads in thread_counts(report)[:1]:
        points = [point for column in all_networks(report) if (point := _point(column, threads))]
        if len(points) > 1:
            return scatter(
                f"{format.title(score_name(report))} over latency",
                points,
                x_name=f"median latency in ms, {format.threads(threads)}",
            )
    return None


def _point(column: Column, threads: str) -> Point | None:
    score, p50, size = column.subject.score, median_latency(column.subject, threads), column.subject.bytes
    if score is None or p50 is None:
        return None
    name, text = column.short_role, describe_point(score, p50, size)
    return Point(name, column.key, p50, score.percent, text, score.low, score.high, size, name)


def bar_charts(report: Report) -> list[Chart | None]:
    columns = compared_networks(report)
    sizes = [
        Mark(column.role, column.key, size / 1e6, format.megabytes(size))
        for column in columns
        if (size := column.subject.bytes) is not None
    ]
    scores = [
        Mark(column.role, column.key, score.percent, format.score_percent(score), score.low, score.high)
        for column in columns
        if (score := column.subject.score) is not None
    ]
    latencies = [
        Mark(
            column.role,
            column.key,
            measured.p50,
            format.milliseconds(measured.p50),
            high=p90.value if (p90 := measured.percentiles.get("p90")) is not None else None,
            group=format.threads(threads),
        )
        for threads in thread_counts(report)
        for column in columns
        if (measured := column.subject.latency_ms.get(threads)) is not None and measured.p50 is not None
    ]
    whiskers = "; line: to p90" if any(mark.high is not None for mark in latencies) else ""
    return [
        bars("Size", sizes, "ONNX file, 1 MB = 1,000,000 bytes"),
        dots(format.title(score_name(report)), scores, "test images; line: 95 % interval"),
        bars("Latency", latencies, f"batch size 1, model only; bar: median{whiskers}"),
    ]


def comparison_table(report: Report) -> Table:
    """Return a row for each measure that a network has, and a column for each network."""
    columns = all_networks(report)
    attributes: dict[str, Attribute] = {
        "Agreement with teacher": (lambda s: s.agreement, format.score),
        f"Validation {score_name(report)} (PyTorch)": (lambda s: s.val_score, format.score),
        "ONNX file": (lambda s: s.bytes, format.megabytes),
    }
    for threads in thread_counts(report):
        read = partial(median_latency, threads=threads)
        attributes[f"Median latency, {format.threads(threads)}"] = (read, format.milliseconds)
    attributes |= {
        "Parameters": (lambda s: s.parameters, format.millions),
        "Multiply-adds": (lambda s: s.gmacs, lambda gmacs: f"{format.significant(gmacs)} G"),
        "Max. logit difference to PyTorch": (lambda s: s.parity, lambda p: format.scientific(p.max_abs)),
        "Max. logit difference / logit range": (lambda s: s.parity, lambda p: format.scientific(p.max_rel)),
    }
    networks = [column.subject for column in columns]
    rows = [["Network", *(network.name for network in networks)]]
    rows += score_rows([network.score for network in networks])
    rows += attribute_rows(networks, attributes)
    return Table(TITLE, ["", *(column.role for column in columns)], rows if columns else [])
