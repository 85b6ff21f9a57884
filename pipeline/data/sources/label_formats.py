"""Formats of labels: tables (CSV, TSV), JSON lines and COCO annotations."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..dataset import Split, printable
from .folders import SPLIT_FOLDERS

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = frozenset((".jsonl", ".ndjson"))
SEPARATOR = ";"
"""Separates the labels in a cell of a table."""

COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "image_path", "path"),
    "labels": ("labels", "label", "tags", "tag", "classes", "class"),
    "split": ("split", "role", "subset"),
}
JSON_EXAMPLE = '{"file": "a.jpg", "labels": ["cat", "dog"]}'

COCO_LISTS = ("images", "annotations", "categories")

# The keys that are kept while a file is parsed; half a gigabyte of COCO is mostly outlines.
_COCO_KEYS = frozenset((*COCO_LISTS, "id", "file_name", "name", "image_id", "category_id"))


@dataclass(frozen=True)
class Row:
    """The labels of one image; ``place`` is its position in the labels file, such as ``line 7``."""

    file: str
    labels: tuple[str, ...]
    split: Split | None
    place: str


def read_rows(path: Path) -> list[Row]:
    """Read a table or JSON lines.

    Raises:
        UsageError: the file is not of its form, or a row lacks a file, labels or a split.
    """
    text = read_text(path)
    is_table = path.suffix.lower() in DELIMITERS
    records = _read_table(path, text) if is_table else _read_json_lines(path, text)
    rows = [
        _parse_row(f"{printable(path.name)}, {place}", place, record, is_table) for place, record in records
    ]
    if not rows:
        raise UsageError(f"{printable(path.name)} contains no images. Write a line for each image.")
    assigned = sum(row.split is not None for row in rows)
    if 0 < assigned < len(rows):
        first = next(row for row in rows if row.split is None)
        raise UsageError(
            f"{printable(path.name)} assigns a split to {assigned} of its {len(rows)} images, but not to the "
            f"one in {first.place}. Assign a split to all images or to none."
        )
    return rows


def read_text(path: Path) -> str:
    """Read a labels file.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
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
    file, labels, split = (_find_cell(record, column) for column in ("file", "labels", "split"))
    if not isinstance(file, str) or not file.strip():
        raise UsageError(f"{location}: the file name is missing.")
    parsed = _parse_labels(labels, location, is_table)
    if not parsed:
        raise UsageError(f"{location}: {printable(file.strip())} has no labels. Add one or remove the image.")
    return Row(file.strip(), parsed, _parse_split(split, location), place)


def _find_cell(record: Mapping[str, Any], column: str) -> Any:
    return next((record[name] for name in COLUMNS[column] if record.get(name) is not None), None)


def _parse_labels(value: Any, location: str, is_table: bool) -> tuple[str, ...]:
    """Return the different labels in their order; in a table they are separated by ``SEPARATOR``."""
    if value is None:
        return ()
    if isinstance(value, str) and is_table:
        value = value.split(SEPARATOR)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in values):
        raise UsageError(f'{location}: labels must be strings, as in ["cat", "dog"].')
    return tuple(dict.fromkeys(label for value in values if (label := printable(str(value).strip()))))


def _parse_split(value: Any, location: str) -> Split | None:
    word = str(value).strip().lower() if value is not None else ""
    if not word:
        return None
    if word not in SPLIT_FOLDERS:
        raise UsageError(
            f"{location}: the split must be one of {', '.join(SPLIT_FOLDERS)}, got '{printable(word)}'."
        )
    return SPLIT_FOLDERS[word]


def read_coco(path: Path) -> tuple[list[Row], list[str]]:
    """Return the images with the names of their categories, and all categories in the order of their ids.

    An image without annotations has no categories.

    Raises:
        UsageError: the file is not a COCO annotations file, or refers to images or categories it lacks.
    """
    name = printable(path.name)
    try:
        content = json.loads(read_text(path), object_hook=_keep)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}.") from error
    lists = {key: content.get(key) if isinstance(content, dict) else None for key in COCO_LISTS}
    if not all(isinstance(entries, list) for entries in lists.values()):
        raise UsageError(
            f"{name} is not a COCO annotations file, which contains the lists {', '.join(COCO_LISTS)}. Other "
            "labels files are .csv or .jsonl."
        )
    categories = _index(name, "categories", "name", lists["categories"])
    names = {number: printable(category) for number, category in categories.items()}
    if len(set(names.values())) < len(names):
        repeated = next(label for label in names.values() if list(names.values()).count(label) > 1)
        raise UsageError(f"{name} has two categories named '{repeated}'. Rename one of them.")
    files = _index(name, "images", "file_name", lists["images"])
    labels: dict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        image, category = (
            annotation.get(key) if isinstance(annotation, dict) else None
            for key in ("image_id", "category_id")
        )
        has_image = isinstance(image, int) and image in files
        if not has_image or not isinstance(category, int) or category not in names:
            missing = printable(f"category {category}" if has_image else f"image {image}")[:80]
            raise UsageError(f"{name} has an annotation of {missing}, which it does not list.")
        labels[image].add(category)
    if not labels:
        raise UsageError(f"{name} has no annotations to learn from.")
    rows = [
        Row(file, tuple(names[c] for c in sorted(labels.get(number, ()))), None, f"image {number}")
        for number, file in files.items()
    ]
    return rows, [names[number] for number in sorted(names)]


def _keep(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _COCO_KEYS & entry.keys()}


def _index(name: str, part: str, key: str, entries: Any) -> dict[int, str]:
    """Return the entries' ``key`` by id."""
    values: dict[int, str] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{name}: an entry of {part} lacks a number 'id' or a string '{key}'.")
        if number in values:
            raise UsageError(f"{name}: two entries of {part} have the id {number}.")
        values[number] = entry[key].strip()
    return values
