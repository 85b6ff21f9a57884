"""Read labels files that are tables or JSON lines: a file name, labels and possibly a split in each row."""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..boxes import NamedBox
from ..dataset import Split, printable
from .split_names import SPLIT_WORDS, parse_split

MAX_WORDS = 8
"""Words of a label that is recognized within another one."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")

SEPARATOR = ";"
"""Separates the labels in a cell of a table; ``|`` does too."""

COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "image_path", "path"),
    "labels": ("labels", "label", "tags", "tag", "classes", "class"),
    "split": ("split", "role", "subset"),
}
JSON_EXAMPLE = '{"file": "a.jpg", "labels": ["cat", "dog"]}'


@dataclass(frozen=True)
class Row:
    """The labels of one image; ``place`` is its position in the labels file, such as ``line 7``.

    ``boxes`` and ``size`` (height, width) are those of ``boxes.clean_boxes``: first as they are stated, then
    as fractions and in pixels.
    """

    file: str
    labels: tuple[str, ...]
    split: Split | None
    place: str
    boxes: tuple[NamedBox, ...] | None = None
    size: tuple[float, float] | None = None


def read_rows(path: Path) -> list[Row]:
    """Read a table or JSON lines.

    Raises:
        UsageError: the file is not of its form, or a row lacks a file, labels or a split, or a label reads as
            several.
    """
    name, text, is_table = printable(path.name), read_text(path), path.suffix.lower() in DELIMITERS
    records = list(_read_table(path, text) if is_table else _read_json_lines(path, text))
    rows = [_parse_row(f"{name}, {place}", place, record, is_table) for place, record in records]
    # A list states where a label ends.
    _check_labels(
        name,
        {
            label
            for row, (_, record) in zip(rows, records, strict=True)
            if not isinstance(_find_value(record, "labels"), list)
            for label in row.labels
        },
    )
    if not rows:
        raise UsageError(f"{name} contains no images. Write a line for each image.")
    unassigned = [row for row in rows if row.split is None]
    if 0 < len(unassigned) < len(rows):
        raise UsageError(
            f"{name} assigns a split to {len(rows) - len(unassigned)} of its {len(rows)} images, but not to "
            f"the one in {unassigned[0].place}. Assign a split to all images or to none."
        )
    return rows


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{printable(str(path))} cannot be read: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")  # with or without the byte order mark of spreadsheets
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{printable(path.name)}, line {line}: it is not UTF-8. Save the file as UTF-8."
        ) from error


def _read_table(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, delimiter = printable(path.name), DELIMITERS[path.suffix.lower()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _parse_header(name, cells, delimiter)
                continue
            place = f"line {reader.line_num}"
            if len(cells) > len(header):
                raise UsageError(
                    f"{name}, {place}: {len(cells)} cells for {len(header)} columns. Separate several labels "
                    f"of an image with '{SEPARATOR}', as in cat{SEPARATOR}dog."
                )
            yield place, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: {error}.") from error


def _parse_header(name: str, cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    if any(not set(COLUMNS[column]) & set(header) for column in ("file", "labels")):
        separator = "tabs" if delimiter == "\t" else "commas"
        raise UsageError(
            f"{name}: the first line must name the columns, separated by {separator}, as in "
            f"file{delimiter}labels or file{delimiter}labels{delimiter}split, got "
            f"'{printable(delimiter.join(cells)[:80])}'."
        )
    return header


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not splitlines: JSON strings may contain other characters at which it splits.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{printable(path.name)}, {place}: it is not JSON ({error}). Each line is an object such as "
                f"{JSON_EXAMPLE}."
            ) from error
        if not isinstance(record, dict):
            raise UsageError(
                f"{printable(path.name)}, {place}: expected an object such as {JSON_EXAMPLE}, got a "
                f"{type(record).__name__}."
            )
        yield place, {key.strip().lower(): value for key, value in record.items()}


def _parse_row(location: str, place: str, record: Mapping[str, Any], is_table: bool) -> Row:
    file, labels, split = (_find_value(record, column) for column in COLUMNS)
    if not isinstance(file, str) or not file.strip():
        raise UsageError(f"{location}: the file name is missing.")
    parsed = _parse_labels(labels, location, is_table)
    if not parsed:
        raise UsageError(f"{location}: {printable(file.strip())} has no labels. Add one or remove the image.")
    word = str(split).strip() if split is not None else ""
    if word and parse_split(word) is None:
        raise UsageError(
            f"{location}: the split must be one of {', '.join(SPLIT_WORDS)}, got '{printable(word)}'."
        )
    return Row(file.strip(), parsed, parse_split(word), place)


def _find_value(record: Mapping[str, Any], column: str) -> Any:
    return next((record[name] for name in COLUMNS[column] if record.get(name) is not None), None)


def _parse_labels(value: Any, location: str, is_table: bool) -> tuple[str, ...]:
    """Return the different labels in their order.

    In a table they are separated by ``SEPARATOR``; text such as ``['cat', 'dog']`` is a list.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        value = _parse_list(value) or (re.split(r"[;|]", value) if is_table else value)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in values):
        raise UsageError(f'{location}: labels must be strings, as in ["cat", "dog"].')
    return tuple(dict.fromkeys(label for value in values if (label := clean_label(str(value)))))


def clean_label(text: str) -> str:
    """Return a label without surrounding space, printable, and in the usual Unicode form of accents (NFC)."""
    return unicodedata.normalize("NFC", printable(text.strip()))


def _parse_list(text: str) -> list[str] | None:
    """Return the items of a list as Python, NumPy or JSON prints it; None for other text."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}") or len(text) < 2:
        return None
    quoted = re.findall(r"\"([^\"]*)\"|'([^']*)'", text)
    if quoted:
        return [double or single for double, single in quoted]
    return text[1:-1].split(",") if text[0] == "[" else None


def _check_labels(name: str, labels: Iterable[str]) -> None:
    """Raise UsageError if a label consists of other labels, with a separator between them."""
    combined = _find_combined(set(labels))
    if combined is not None:
        label, parts = combined
        raise UsageError(
            f"{name}: the label '{label}' reads as several labels of other images, "
            f"{' and '.join(map(repr, parts))}. Separate several labels with '{SEPARATOR}', as in "
            f"{SEPARATOR.join(parts)}. If it is one class, use a .jsonl file with a list of labels for each "
            "image."
        )


def _find_combined(labels: set[str]) -> tuple[str, list[str]] | None:
    """Return a label and its parts if each part is, or is part of, another label; None if there is none."""
    for separator in r",;|/+&":
        parts_of = {
            label: parts
            for label in sorted(labels)
            if len(parts := [part for text in label.split(separator) if (part := text.strip())]) > 1
        }
        counts = Counter(part for parts in parts_of.values() for part in set(parts))
        counts.update(labels - parts_of.keys())
        for label, parts in parts_of.items():
            if all(counts[part] > 1 for part in parts):
                return label, parts
    for label in sorted(labels):
        words = _split_words(label.split(), labels)
        if words is not None and len(words) > 1:
            return label, words
    return None


def _split_words(words: Sequence[str], labels: set[str]) -> list[str] | None:
    """Return the words as the labels that they consist of, except for the label of all of them."""
    start: list[list[str] | None] = [[], *[None for _ in words]]
    for end in range(1, len(words) + 1):
        for begin in range(max(0, end - MAX_WORDS), end):
            before, label = start[begin], " ".join(words[begin:end])
            if before is not None and label in labels and end - begin < len(words):
                start[end] = [*before, label]
                break
    return start[-1]
