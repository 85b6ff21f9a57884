"""Which pictures a report shows: the networks side by side, and the curves of every training."""

from dataclasses import dataclass

from ..runs.results import Epoch, Report
from . import format
from .charts import Curve, Lines, Mark, Rows, bars, dots, lines
from .networks import Column, compared, every, measure, threads
from .tradeoff import Spot, Tradeoff, tradeoff


def comparison(report: Report) -> list[Rows]:
    """Size, accuracy, latency: as far as they are known."""
    columns = compared(report)
    sizes = [
        Mark(column.role, column.key, column.subject.bytes / 1e6, format.megabytes(column.subject.bytes))
        for column in columns
        if column.subject.bytes is not None
    ]
    scores = [
        Mark(
            column.role,
            column.key,
            score.percent,
            format.percent(score.percent, score.n),
            score.low,
            score.high,
        )
        for column in columns
        if (score := column.subject.score) is not None
    ]
    latencies = [
        Mark(
            column.role,
            column.key,
            measured.p50,
            format.milliseconds(measured.p50),
            high=measured.value("p90"),
            group=format.threads(count),
        )
        for count in threads(report)
        for column in columns
        if (measured := column.subject.latency_ms.get(count)) is not None and measured.p50 is not None
    ]
    drawn = [
        bars("Size", sizes, "ONNX file; 1 MB is 1,000,000 bytes"),
        dots(measure_title(report), scores, "test images; line: 95 % interval"),
        bars(
            "Latency",
            latencies,
            "one image, the model alone; bar: median"
            + ("; line: to the 90th percentile" if any(mark.high is not None for mark in latencies) else ""),
        ),
    ]
    return [one for one in drawn if one is not None]


def trade(report: Report) -> Tradeoff | None:
    """What is paid in accuracy for what is won in time and size, at the fewest threads that were timed."""
    for count in threads(report)[:1]:
        spots = [one for column in every(report) if (one := _spot(column, count))]
        if len(spots) > 1:
            return tradeoff(
                f"{measure_title(report)} over latency",
                spots,
                x_name=f"median ms an image, {format.threads(count)}",
            )
    return None


def _spot(column: Column, count: str) -> Spot | None:
    """None where accuracy or latency is not known."""
    subject, measured = column.subject, column.subject.latency_ms.get(count)
    score = subject.score
    if score is None or measured is None or measured.p50 is None:
        return None
    return Spot.of(column.short, column.key, score, measured.p50, subject.bytes, label=column.short)


@dataclass(frozen=True)
class Training:
    """The curves of one stage."""

    stage: str
    charts: list[Lines]


def trainings(report: Report) -> list[Training]:
    """Losses, accuracy and learning rate of every stage that trained, in the order they ran."""
    found = []
    for stage in dict.fromkeys(epoch.stage for epoch in report.epochs):
        epochs = [epoch for epoch in report.epochs if epoch.stage == stage]
        charts = [
            lines("Loss", _losses(epochs)),
            lines(f"{measure_title(report)}, %", _accuracies(epochs), from_zero=False, top=100),
            lines("Learning rate", [_curve("Learning rate", epochs, [e.learning_rate for e in epochs])]),
        ]
        found.append(Training(stage, [chart for chart in charts if chart is not None]))
    return found


def measure_title(report: Report) -> str:
    """At the head of a picture."""
    return format.title(measure(report))


def watched(report: Report) -> list[Lines]:
    """What the methods watch, a picture for each name."""
    epochs = [epoch for epoch in report.epochs if epoch.watched]
    names = dict.fromkeys(name for epoch in epochs for name in epoch.watched)
    several = len({epoch.stage for epoch in epochs}) > 1
    drawn = []
    for name in names:
        curves = []
        for stage in dict.fromkeys(epoch.stage for epoch in epochs):
            own = [epoch for epoch in epochs if epoch.stage == stage]
            label = stage if several else _title(name)
            curves.append(_curve(label, own, [epoch.watched.get(name) for epoch in own]))
        drawn.append(lines(_title(name), curves))
    return [chart for chart in drawn if chart is not None]


WATCHED = {
    "max_p_t": "Mean of the largest p_T",
    "word_accuracy": "Word accuracy",
    "gamma": "γ of the cosine head",
    "feature_distance": "Mean squared distance to the teacher’s vector",
    "equal_bits": "Share of the hashes’ bits that are the teacher’s",
    "teacher_right": "Share of images that the teacher is right on",
}


def _title(name: str) -> str:
    """A watched value's title; a term's own addition, as in ``gamma (resnet50 map)``, stays."""
    key, separator, term = name.partition(" (")
    title = WATCHED.get(key, key.replace("_", " "))
    return (title[:1].upper() + title[1:] if title.isascii() else title) + separator + term


def _losses(epochs: list[Epoch]) -> list[Curve]:
    """The sum first, then its terms; a single term is its own sum."""
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.losses))
    if "loss" in names:
        names.remove("loss")
        names.insert(0, "loss")
    if len(names) == 2 and names[0] == "loss":
        del names[0]
    return [
        _curve(
            "sum" if name == "loss" and len(names) > 1 else name, epochs, [e.losses.get(name) for e in epochs]
        )
        for name in names
    ]


def _accuracies(epochs: list[Epoch]) -> list[Curve]:
    return [
        _curve("train", epochs, [epoch.train_accuracy for epoch in epochs]),
        _curve("val", epochs, [epoch.val_accuracy for epoch in epochs]),
    ]


def _curve(label: str, epochs: list[Epoch], values: list[float | None]) -> Curve:
    return Curve(label, [epoch.epoch for epoch in epochs], values)
