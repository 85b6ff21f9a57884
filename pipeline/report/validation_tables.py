"""What a validation says in tables, and of files in pairs: the pages and the terminal say the same."""

from collections.abc import Callable

from ..evaluation.results import ClassMeasure, Network, Pair, Validation
from ..runs.scores import Proportion
from ..tasks import TASKS
from . import format
from .tables import Table, score_rows

MOST_CONFUSED = 20


def networks(found: Validation) -> Table:
    """Measures down, files across; a measure nobody has is left out."""
    every = found.networks

    def row(name: str, value: Callable[[Network], str | None]) -> list[list[str]]:
        values = [value(one) for one in every]
        return [[name, *(one or format.MISSING for one in values)]] if any(values) else []

    rows = score_rows([one.score for one in every])
    rows += row("Agreement with the teacher", lambda one: _percent(one.agreement))
    rows += row("… 95 % interval", lambda one: _interval(one.agreement))
    rows += row("NLL", lambda one: format.significant(one.calibration.nll) if one.calibration else None)
    rows += row("ECE", lambda one: format.percent(one.calibration.ece, found.n) if one.calibration else None)
    rows += row("ONNX file", lambda one: format.megabytes(one.bytes))
    return Table("Files", ["", *(one.name for one in every)], rows)


def _percent(score: Proportion | None) -> str | None:
    return format.percent(score.percent, score.n) if score else None


def _interval(score: Proportion | None) -> str | None:
    return format.percent_interval(score.low, score.high, score.n) if score else None


def pairs(found: Validation) -> Table:
    """Every two files on the same images."""
    rows = [
        [
            f"{one.first} against {one.second}",
            f"{one.first_alone:,}",
            f"{one.second_alone:,}",
            format.points(one.points, found.n),
            p_value(one.p),
            p_value(one.p_holm),
            in_words(one),
        ]
        for one in found.pairs
    ]
    note = (
        f"McNemar’s exact test: how many images only one of the files has right. {TASKS[found.task].prediction_note} "
        "The word goes by p corrected for the number of pairs (Holm), at 5 %."
    )
    names = ["", "first alone", "second alone", "difference", "p", "p, Holm", ""]
    return Table("In pairs, on the same images", names, rows, note=note)


def in_words(one: Pair) -> str:
    """A pair's verdict: no difference that these images can tell is not the same as none."""
    return "no measurable difference" if one.verdict == "no difference" else one.verdict


def told(one: Pair, n: int) -> str:
    """int8 against fp32: −0.3 points, no measurable difference (p = 1.000)."""
    p = p_value(one.p_holm)
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    return f"{one.first} against {one.second}: {format.points(one.points, n)}, {in_words(one)} ({p})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def classes(network: Network) -> Table:
    """A row per class: recall and precision with their intervals."""
    scores = network.score.classes if network.score is not None else []
    precise = {one.label: one for one in scores if one.threshold is not None}
    rows = []
    for one in network.per_class:
        row = [one.label, format.count(one.n), *_share(one.recall), *_share(one.precision), _f1(one)]
        if precise:
            of = precise.get(one.label)
            row.append(format.MISSING if of is None else format.percent(of.percent, of.n))
        rows.append(row)
    names = ["class", "images", "recall", "95 % interval", "precision", "95 % interval", "F1"]
    note = "Recall: of a class’s images, those that are answered so. Precision: of the answers, those right."
    return Table(
        f"By class, {network.name}", [*names, *(["average precision"] if precise else [])], rows, note=note
    )


def _share(share: Proportion | None) -> tuple[str, str]:
    if share is None:
        return format.MISSING, format.MISSING
    return format.percent(share.percent), format.percent_interval(share.low, share.high)


def _f1(one: ClassMeasure) -> str:
    return format.percent(one.f1)


def confused(network: Network) -> Table:
    """The pairs of classes that are confused most often."""
    rows = [
        [one.label, one.answer, format.count(one.n), format.percent(one.share)]
        for one in network.confused[:MOST_CONFUSED]
    ]
    more = len(network.confused) - len(rows)
    note = f"The {MOST_CONFUSED} most frequent; validation.json has more." if more > 0 else ""
    return Table("Most confused", ["true class", "answer", "images", "of the class"], rows, note=note, left=2)


def files(found: Validation) -> Table:
    rows = [
        [
            one.name,
            one.file,
            one.source,
            f"{one.image_size} px",
            format.megabytes(one.bytes),
            one.sha256,
            "" if one.fused else f"made for {one.target}, asked without integer kernels",
        ]
        for one in found.networks
    ]
    names = ["", "file", "named as", "image", "size", "sha256", "how"]
    return Table("Files asked", names, rows, code=frozenset({1, 2, 5}), text=True)


def skipped(found: Validation) -> Table:
    rows = [[name, reason] for name, reason in found.skipped]
    return Table("Left out", ["file", "why"], rows, code=frozenset({0}), text=True)
