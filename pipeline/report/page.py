"""Pages as data: a page is a list of sections, which contain text, figures and tables."""

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..runs.scores import Confusion
from . import format
from .tables import CsvFile, Table

MAX_MATRIX_CLASSES = 20
"""A larger confusion matrix is unreadable: the most confused pairs are listed instead."""
SMALL_IMAGE = 100
"""Side in pixels below which images are enlarged without smoothing."""
LARGE_IMAGE = 128
"""Side in pixels above which an image gets twice the width."""


class Figure(Protocol):
    """A chart, matrix or set of images. The macro ``kind`` of figures.html.j2 draws it."""

    @property
    def kind(self) -> str: ...

    @property
    def description(self) -> str:
        """The figure in words: for screen readers, and in Markdown unless there is a table."""

    @property
    def table(self) -> Table | None:
        """The same content for Markdown."""


@dataclass(frozen=True)
class Bar:
    """One of the bars of a key figure; ``percent`` of the longest one."""

    label: str
    key: str
    percent: float


@dataclass(frozen=True)
class KeyFigure:
    """A large number on the first screen, its meaning, details, and bars that show the same comparison."""

    value: str
    meaning: str
    details: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        return self.value != format.MISSING


@dataclass(frozen=True)
class Section:
    """A part of a page. Empty tables and missing figures are not shown; ``folded`` tables open on a click."""

    title: str
    id: str = ""
    """Anchor of a section that is listed at the head of the page."""
    text: Sequence[str] = ()
    """Paragraphs."""
    warnings: Sequence[str] = ()
    command: str = ""
    figures: Sequence[Figure | None] = ()
    tables: Sequence[Table] = ()
    sections: Sequence["Section"] = ()
    folded: Sequence[Table] = ()
    is_folded: bool = False
    """Only the title is shown until a click on it."""

    def fold(self) -> "Section":
        return replace(self, is_folded=True)

    @property
    def is_empty(self) -> bool:
        has_tables = any(table.rows for table in (*self.tables, *self.folded))
        has_sections = not all(section.is_empty for section in self.sections)
        return not (has_tables or has_sections or any(self.figures) or self.command)


@dataclass(frozen=True)
class Page:
    kind: str
    """The page's name next to that of the program."""
    title: str
    lead: str
    sections: list[Section]
    footer: str
    data_file: str
    """The JSON file with the rows that the page leaves out."""
    warnings: list[str] = field(default_factory=list)
    key_figures: list[KeyFigure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Lines under the key figures."""

    def csv_files(self) -> dict[str, CsvFile]:
        """Return the files of tables that are cut, by name."""
        sections = list(self.sections)
        files: dict[str, CsvFile] = {}
        for section in sections:
            sections += section.sections
            files |= {table.csv.name: table.csv for table in section.tables if table.csv is not None}
        return files

    @property
    def shown_sections(self) -> list[Section]:
        return [section for section in self.sections if not section.is_empty]


@dataclass(frozen=True)
class MatrixCell:
    text: str
    kind: str
    percent: int
    """Percentage of the true class, which sets the strength of the cell's color."""


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: rows are true classes, columns predictions."""

    classes: list[str]
    rows: list[list[MatrixCell]]
    description: str
    kind: str = "matrix"

    @property
    def table(self) -> Table:
        named = zip(self.classes, self.rows, strict=True)
        rows = [[name, *(cell.text or "0" for cell in row)] for name, row in named]
        return Table("Confusion matrix (rows: true class, columns: prediction)", ["", *self.classes], rows)


def confusion_matrix(confusion: Confusion | None, classes: list[str], caption: str) -> Matrix | None:
    """Return the matrix with its zeros; None if it has too many classes."""
    if not confusion or len(classes) > MAX_MATRIX_CLASSES:
        return None
    counts = [[0] * len(classes) for _ in classes]
    for label, prediction, images in confusion:
        counts[label][prediction] = images
    rows = [
        [
            MatrixCell(
                f"{n:,}" if n else "",
                "hit" if truth == predicted else "miss" if n else "none",
                round(100 * n / sum(row)) if n else 0,
            )
            for predicted, n in enumerate(row)
        ]
        for truth, row in enumerate(counts)
    ]
    return Matrix(classes, rows, caption)


@dataclass(frozen=True)
class Prediction:
    label: str
    probability: str
    correct: bool

    @property
    def text(self) -> str:
        return f"{self.label} ({self.probability}), {'correct' if self.correct else 'wrong'}"


@dataclass(frozen=True)
class Picture:
    """A test image and its predictions. ``png`` is empty if the report holds no valid PNG of it."""

    name: str
    label: str
    student: Prediction
    teacher: Prediction | None
    png: str
    is_small: bool
    is_large: bool


@dataclass(frozen=True)
class Gallery:
    """Test images with predictions."""

    title: str
    pictures: list[Picture]
    kind: str = "gallery"

    @property
    def description(self) -> str:
        return f"{self.title}: {format.plural(len(self.pictures), 'image')}."

    @property
    def table(self) -> Table:
        rows = [
            [p.name, p.label, p.student.text, p.teacher.text if p.teacher else format.MISSING]
            for p in self.pictures
        ]
        columns = ["image", "label", "student", "teacher"]
        return Table(self.title, columns, rows, code=frozenset({0}), text=True)


def check_png(text: str) -> tuple[str, int]:
    """Return base64 text without whitespace, and the longer side of its PNG; ("", 0) if it is not a PNG."""
    text = re.sub(r"\s", "", text)
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        content = b""
    if not content.startswith(b"\x89PNG\r\n\x1a\n") or len(content) < 24:
        return "", 0
    return text, max(struct.unpack(">II", content[16:24]))
