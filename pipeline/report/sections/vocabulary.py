"""QuEST's visual vocabulary in the report, and the metrics of methods."""

from dataclasses import dataclass

from ...runs.results import Report, ShownWord, Words
from .. import format
from ..charts import Chart, Curve, lines
from ..page import Figure, Section, check_png
from ..tables import Table
from .training import method_charts


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
    table: Table | None = None

    @property
    def description(self) -> str:
        return "; ".join(f"{word.title} {word.note}" for word in self.words) + "."


def section(report: Report) -> Section:
    """Return the vocabulary, or only the metrics of other methods."""
    shown = next((words for words in report.words if words.shown), None)
    figures: list[Figure | None] = []
    if shown is not None:
        words = [_word(word, shown) for word in shown.shown]
        figures.append(Patches(words, _describe_patches(shown, report)))
    figures += [*(_usage(report, words) for words in report.words), *method_charts(report)]
    return Section(
        "Visual vocabulary" if report.words else "Method metrics",
        "words",
        text=[" ".join(_sentences(report))] if report.words else [],
        figures=figures,
        tables=[_table(report), _reconstruction(report)],
    )


def _sentences(report: Report) -> list[str]:
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


def _usage(report: Report, words: Words) -> Chart | None:
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


def _table(report: Report) -> Table:
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


def _reconstruction(report: Report) -> Table:
    """Return FEED's error for each teacher in the first and the last epoch."""
    rows = [
        [result.stage, result.teacher, format.number(result.first), format.number(result.error)]
        for result in report.reconstruction
    ]
    note = "Mean absolute difference over √n of the student’s translated feature map to the teacher’s, both "
    note += "of norm 1, on training images: 0 for equal directions, about 1.1 for random ones."
    columns = ["stage", "teacher", "first epoch", "last epoch"]
    return Table("Reconstruction error", columns, rows, note=note, left=2)
