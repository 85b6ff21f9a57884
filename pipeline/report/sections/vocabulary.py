"""What the report says and shows of QuEST's words: how unevenly they are used, and a few as pictures."""

from dataclasses import dataclass

from ...runs.results import Report, ShownWord, Words
from .. import format
from ..charts import Curve, Lines, lines
from ..format import png
from ..tables import Table


@dataclass(frozen=True)
class Shown:
    """One word: ``patches`` are PNGs in base64, the nearest first."""

    title: str
    note: str
    description: str
    patches: list[str]


@dataclass(frozen=True)
class Section:
    text: str
    usage: list[Lines]
    shown: list[Shown]
    shown_note: str
    table: Table


def section(report: Report) -> Section:
    """Empty where no method has words."""
    pictured = next((one for one in report.words if one.shown), None)
    return Section(
        " ".join(sentences(report)),
        [chart for one in report.words if (chart := _usage(one, several=len(report.words) > 1))],
        [] if pictured is None else [_shown(one, pictured) for one in pictured.shown],
        "" if pictured is None else _note(pictured, report),
        table(report),
    )


def sentences(report: Report) -> list[str]:
    if not report.words:
        return []
    told = [
        "The teacher’s feature maps, as the method sees them: every position is described by its nearest "
        "words. Perplexity is the number of words that are effectively in use."
    ]
    for one in report.words:
        if one.dead is None or not one.usage:
            continue
        of = f" of {one.teacher}" if len(report.words) > 1 else ""
        dead = (
            f"{one.dead:,} {'word' if one.dead == 1 else 'words'}{of} {'is' if one.dead == 1 else 'are'} no"
        )
        most = format.significant(100 * one.usage[0][1] / one.features_used, 2)
        first = dead if one.dead else f"Every word{of} is some"
        told.append(f"{first} feature’s nearest; the most used one is that of {most} % of the features.")
    return told


def _usage(one: Words, *, several: bool) -> Lines | None:
    title = f"Usage of the words ({one.teacher} {one.level})" if several else "Usage of the words"
    curve = Curve("features", [rank for rank, _ in one.usage], [float(count) for _, count in one.usage])
    return lines(title, [curve], x_name="word, the most used first") if one.usage else None


def _shown(one: ShownWord, words: Words) -> Shown:
    place = f"Word {one.rank:,} of {words.words:,}"
    patches = [found for patch in one.patches if (found := png(patch)[0])]
    share = f"nearest to {format.significant(one.share, 2)} % of the features"
    what = format.counted(len(patches), "patch", "patches")
    return Shown(place, share, f"{place} by use: the {what} of images nearest to it", patches)


def _note(words: Words, report: Report) -> str:
    of = f" of {words.teacher}" if len(report.words) > 1 else ""
    told = (
        f"Some words{of}, from the most used to rarer ones, each as the patches nearest to it, the nearest "
    )
    told += "first and each of another image"
    if words.patch is not None and words.seen is not None:
        told += f": {words.patch} × {words.patch} pixels around a position of the map, looked for in "
        told += format.counted(words.seen, "image")
    return f"{told}."


def table(report: Report) -> Table:
    rows = [
        [
            one.teacher,
            one.level,
            format.count(one.words) + (f" (of {one.asked:,} asked)" if one.asked != one.words else ""),
            f"{one.features_used:,} of {one.features:,}",
            format.number(one.perplexity),
            format.percent(100 * one.perplexity / one.words) if one.words else format.MISSING,
            format.number(one.mu),
        ]
        for one in report.words
    ]
    return Table(
        "Vocabulary",
        ["teacher", "readout", "words", "features clustered", "perplexity", "of the words", "μ"],
        rows,
        note=" ".join(dict.fromkeys(one.note for one in report.words if one.note)),
        left=2,
    )
