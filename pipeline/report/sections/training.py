"""Training in the report: curves, epochs, cost, rounds, cached teacher outputs, metrics of methods, words."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from ...runs.results import Epoch, Report, ShownWord, Words
from .. import format
from ..charts import Chart, Curve, lines
from ..networks import score_name
from ..page import Figure, Section, check_png
from ..tables import Attribute, Table, attribute_rows

METHOD_METRICS = {
    "max_p_t": "Mean of the largest p_T",
    "word_accuracy": "Word accuracy",
    "gamma": "γ of the cosine head",
    "feature_distance": "Mean squared distance to the teacher’s vector",
    "equal_bits": "Fraction of hash bits equal to the teacher’s",
    "teacher_right": "Fraction of images that the teacher classifies correctly",
}
MAX_IMAGES_PER_SECOND = 1e15
"""Higher throughputs come from epochs without a measurable time."""


def section(report: Report) -> Section:
    parts = []
    for stage, epochs in _by_stage(report.epochs).items():
        scores = [
            _curve("train", epochs, [epoch.train_accuracy for epoch in epochs]),
            _curve("val", epochs, [epoch.val_accuracy for epoch in epochs]),
        ]
        charts = [
            lines("Loss", _losses(epochs)),
            lines(f"{format.title(score_name(report))}, %", scores, from_zero=False, top=100),
            lines("Learning rate", [_curve("Learning rate", epochs, [e.learning_rate for e in epochs])]),
        ]
        parts.append(Section(stage, figures=charts))
    return Section(
        "Training",
        "training",
        sections=parts,
        tables=[cost_table(report), rounds_table(report), cache_table(report)],
        folded=[epoch_table(report)],
    )


def _by_stage(epochs: Iterable[Epoch]) -> dict[str, list[Epoch]]:
    stages: dict[str, list[Epoch]] = {}
    for epoch in epochs:
        stages.setdefault(epoch.stage, []).append(epoch)
    return stages


def method_charts(report: Report) -> list[Chart | None]:
    """Draw each metric that methods report, with a curve for each stage."""
    epochs = [epoch for epoch in report.epochs if epoch.metrics]
    stages, charts = _by_stage(epochs), []
    for name in dict.fromkeys(name for epoch in epochs for name in epoch.metrics):
        title = _metric_title(name)
        curves = [
            _curve(stage if len(stages) > 1 else title, own, [epoch.metrics.get(name) for epoch in own])
            for stage, own in stages.items()
        ]
        charts.append(lines(title, curves))
    return charts


def _metric_title(name: str) -> str:
    """Return the title of a metric; a suffix such as the one of ``gamma (resnet50 map)`` is kept."""
    key, separator, suffix = name.partition(" (")
    title = METHOD_METRICS.get(key, key.replace("_", " "))
    return (format.capitalize(title) if title.isascii() else title) + separator + suffix


def _losses(epochs: list[Epoch]) -> list[Curve]:
    """Return the total, then its terms; a single term without the total."""
    names = [name for name in dict.fromkeys(n for epoch in epochs for n in epoch.losses) if name != "loss"]
    if len(names) != 1:
        names.insert(0, "loss")
    labels = {"loss": "total"} if len(names) > 1 else {}
    return [_curve(labels.get(name, name), epochs, [e.losses.get(name) for e in epochs]) for name in names]


def _curve(label: str, epochs: list[Epoch], values: list[float | None]) -> Curve:
    return Curve(label, [epoch.epoch for epoch in epochs], values)


def cost_table(report: Report) -> Table:
    """Return what each training cost, without the measures that none of them has."""
    stages, limit = _by_stage(report.epochs), MAX_IMAGES_PER_SECOND
    costs: dict[str, Attribute] = {
        "images/s": (
            lambda epochs: _median(n for e in epochs if (n := e.images_per_second) < limit),
            lambda value: format.number(round(value)),
        ),
        "time per epoch": (lambda epochs: _median(e.seconds for e in epochs), format.duration),
        "peak memory": (
            lambda epochs: max((m for e in epochs if (m := e.peak_memory_bytes) is not None), default=None),
            format.megabytes,
        ),
        "time by phase": (_phases, str),
        "MFU": (lambda epochs: _median(e.mfu for e in epochs), lambda mfu: format.percent(100 * mfu)),
    }
    by_cost = attribute_rows(list(stages.values()), costs)
    rows = [[stage, *(row[1 + i] for row in by_cost)] for i, stage in enumerate(stages)]
    columns = [row[0] for row in by_cost]
    note = "Medians over epochs, without evaluation."
    note += " MFU: model FLOPs utilization of the device." if "MFU" in columns else ""
    return Table("Training cost", ["stage", *columns], rows, note=note, text=True)


def _median(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _phases(epochs: list[Epoch]) -> str | None:
    """Return the fraction of the time in each phase, over all epochs."""
    timed = [(epoch.time_fractions, epoch.seconds or 1.0) for epoch in epochs if epoch.time_fractions]
    total = sum(seconds for _, seconds in timed)
    percents = {
        phase: 100 * sum(fractions.get(phase, 0.0) * seconds for fractions, seconds in timed) / total
        for phase in dict.fromkeys(phase for fractions, _ in timed for phase in fractions)
    }
    # In the training of a teacher, "student" is the network that is trained.
    labels = {"student": "trained network"}
    texts = (f"{labels.get(phase, phase)} {format.percent(percent)}" for phase, percent in percents.items())
    return ", ".join(texts) or None


def epoch_table(report: Report) -> Table:
    rows = [
        [
            epoch.stage,
            f"{epoch.epoch:,} of {epoch.epochs:,}",
            ", ".join(f"{name} {format.number(value)}" for name, value in epoch.losses.items()),
            format.percent(epoch.train_accuracy),
            format.percent(epoch.val_accuracy),
            format.number(epoch.learning_rate),
            format.number(round(epoch.images_per_second))
            if epoch.images_per_second < MAX_IMAGES_PER_SECOND
            else format.MISSING,
        ]
        for epoch in report.epochs
    ]
    columns = ["stage", "epoch", "losses", "train", "val", "learning rate", "images/s"]
    return Table("Epochs", columns, rows, text=True)


def rounds_table(report: Report) -> Table:
    """Return the student of each round; the last one ships."""
    last = report.config.get("rounds", 1)
    rows = [
        [
            f"{result.round}{' (shipped)' if result.round == last else ''}",
            result.teacher,
            format.score_percent(result.val_score),
            format.score_interval(result.val_score),
            format.score_percent(result.score),
            format.score_interval(result.score),
        ]
        for result in report.rounds
    ]
    columns = ["round", "teacher", "validation", "95 % interval", "test", "95 % interval"]
    note = "The student of each round is the teacher of the next. Measured in PyTorch, before export."
    return Table("Rounds", columns, rows, note=note, left=2)


def cache_table(report: Report) -> Table:
    """Return the cached teacher outputs that the student was trained on."""
    usage = report.teacher_cache
    if usage is None:
        return Table("Cached teacher outputs", [], [])
    rows = [
        ["views per image", f"{usage.views:,}" + (" (all possible views)" if usage.complete else "")],
        ["size of one view of all images", format.megabytes(usage.bytes_per_view)],
        ["size of all views", format.megabytes(usage.views * usage.bytes_per_view)],
        ["views computed in this run", f"{usage.computed:,}"],
    ]
    if usage.lost_mass is not None:
        rows.append(["probability mass of p_T not cached", f"{format.significant(100 * usage.lost_mass)} %"])
    return Table("Cached teacher outputs", ["", ""], rows, text=True)


@dataclass(frozen=True)
class Word:
    """A visual word as PNGs (base64) of the nearest image patches."""

    title: str
    note: str
    description: str
    patches: list[str]


@dataclass(frozen=True)
class Patches:
    words: list[Word]
    note: str
    kind: str = "patches"
    table: None = None

    @property
    def description(self) -> str:
        return "; ".join(f"{word.title} {word.note}" for word in self.words) + "."


def vocabulary_section(report: Report) -> Section:
    """Return the vocabulary, or only the metrics of other methods."""
    figures: list[Figure | None] = []
    for shown in [words for words in report.words if words.shown][:1]:
        words = [_word(word, shown) for word in shown.shown]
        figures.append(Patches(words, _describe_patches(shown, report)))
    figures += [*(_usage_chart(report, words) for words in report.words), *method_charts(report)]
    return Section(
        "Visual vocabulary" if report.words else "Method metrics",
        "words",
        text=[" ".join(_describe_words(report))] if report.words else [],
        figures=figures,
        tables=[_vocabulary_table(report), _reconstruction_table(report)],
    )


def _describe_words(report: Report) -> list[str]:
    sentences = [
        "Each position of the teacher’s feature map is described by its nearest visual words.",
        "Perplexity is the effective number of words in use.",
    ]
    for words in report.words:
        if words.dead is None or not words.usage:
            continue
        teacher = f" of {words.teacher}" if len(report.words) > 1 else ""
        most = format.significant(100 * words.usage[0][1] / words.features_used, 2)
        unused = f"{format.plural(words.dead, 'word')}{teacher} {'is' if words.dead == 1 else 'are'}"
        first = f"{unused} never the nearest word" if words.dead else f"No word{teacher} is unused"
        sentences.append(f"{first}; the most frequent word is the nearest of {most} % of the features.")
    return sentences


def _usage_chart(report: Report, words: Words) -> Chart | None:
    suffix = f" ({words.teacher} {words.level})" if len(report.words) > 1 else ""
    ranks, counts = [rank for rank, _ in words.usage], [float(count) for _, count in words.usage]
    return lines(f"Word frequency{suffix}", [Curve("features", ranks, counts)], x_name="rank of the word")


def _word(word: ShownWord, words: Words) -> Word:
    title = f"Word {word.rank:,} of {words.words:,}"
    patches = [png for patch in word.patches if (png := check_png(patch)[0])]
    note = f"nearest word of {format.significant(word.share, 2)} % of the features"
    description = f"{title} by frequency: {format.plural(len(patches), 'nearest patch', 'nearest patches')}"
    return Word(title, note, description, patches)


def _describe_patches(words: Words, report: Report) -> str:
    teacher = f" of {words.teacher}" if len(report.words) > 1 else ""
    sentence = f"Words{teacher} from frequent to rare, each with its nearest patches, one per image"
    if words.patch is not None and words.seen is not None:
        sentence += f": {words.patch} × {words.patch} pixels around a position of the feature map, from "
        sentence += format.plural(words.seen, "image")
    return f"{sentence}."


def _vocabulary_table(report: Report) -> Table:
    rows = [
        [
            words.teacher,
            words.level,
            format.count(words.words)
            + (f" ({words.requested:,} requested)" if words.requested != words.words else ""),
            f"{words.features_used:,} of {words.features:,}",
            format.number(words.perplexity),
            format.percent(100 * words.perplexity / words.words) if words.words else format.MISSING,
            format.number(words.mu),
        ]
        for words in report.words
    ]
    columns = ["teacher", "features", "words", "clustered features", "perplexity", "perplexity / words", "μ"]
    note = " ".join(dict.fromkeys(words.note for words in report.words if words.note))
    return Table("Vocabulary", columns, rows, note=note, left=2)


def _reconstruction_table(report: Report) -> Table:
    """Return FEED's error for each teacher in the first and the last epoch."""
    rows = [
        [result.stage, result.teacher, format.number(result.first), format.number(result.error)]
        for result in report.reconstruction
    ]
    note = "Mean absolute difference over √n of the student’s translated feature map to the teacher’s, both "
    note += "of norm 1, on training images: 0 for equal directions, about 1.1 for random ones."
    columns = ["stage", "teacher", "first epoch", "last epoch"]
    return Table("Reconstruction error", columns, rows, note=note, left=2)
