"""Labels files as rows: tables with a header (.csv, .tsv) and JSON lines (.jsonl, .ndjson)."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .dataset import Role, printable
from .sources.folders import ROLE_FOLDERS

TABLES = {".csv": ",", ".tsv": "\t"}
JSON_LINES = frozenset((".jsonl", ".ndjson"))
SEPARATOR = ";"
"""Between the labels in a cell of a table."""

COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "image_path", "path"),
    "labels": ("labels", "label", "tags", "tag", "classes", "class"),
    "role": ("split", "role", "subset"),
}


@dataclass(frozen=True)
class Row:
    """What a labels file says of one image; ``place`` is where it says so, such as ``line 7``."""

    file: str
    labels: tuple[str, ...]
    role: Role | None
    place: str


def read_rows(path: Path) -> list[Row]:
    """The rows of a table or of JSON lines.

    Raises:
        UsageError: the file is not of its form, or a row lacks a file, its labels or its split.
    """
    text = read_text(path)
    is_table = path.suffix.lower() in TABLES
    records = _of_table(path, text) if is_table else _of_json_lines(path, text)
    rows = [_row(path, place, record) for place, record in records]
    if not rows:
        raise UsageError(f"{printable(path.name)} names no images; write a line for each.")
    assigned = sum(row.role is not None for row in rows)
    if 0 < assigned < len(rows):
        first = next(row for row in rows if row.role is None)
        raise UsageError(
            f"{printable(path.name)} gives {assigned} of its {len(rows)} images a split, and none to the one "
            f"in {first.place}; give every image one, or none."
        )
    return rows


def read_text(path: Path) -> str:
    """A labels file's text.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{printable(str(path))} cannot be read: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")  # with the mark that spreadsheets put first, or without
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{printable(path.name)} is not UTF-8 (line {line}); save it with that encoding."
        ) from error


def _of_table(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, delimiter = printable(path.name), TABLES[path.suffix.lower()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(name, cells, delimiter)
                continue
            place = f"line {reader.line_num}"
            if len(cells) > len(header):
                raise UsageError(
                    f"{name}, {place}: {len(cells)} cells under {len(header)} columns; several labels of an "
                    f"image are written with {SEPARATOR} between them, as in cat{SEPARATOR}dog."
                )
            yield place, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: {error}.") from error


def _header(name: str, cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    if any(not set(COLUMNS[column]) & set(header) for column in ("file", "labels")):
        between = "a tab" if delimiter == "\t" else "a comma"
        begins = printable(delimiter.join(cells)[:80])
        raise UsageError(
            f"{name} begins with '{begins}'; its first line must name the columns, with {between} between "
            f"them, as in file{delimiter}labels or file{delimiter}labels{delimiter}split."
        )
    return header


def _of_json_lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not splitlines: JSON's strings may hold characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{printable(path.name)}, line {number}: no JSON ({error}); each line is an object such as "
                '{"file": "a.jpg", "labels": ["cat", "dog"]}.'
            ) from error
        if not isinstance(record, dict):
            raise UsageError(
                f"{printable(path.name)}, line {number}: a {type(record).__name__} in the place of an object "
                'such as {"file": "a.jpg", "labels": ["cat", "dog"]}.'
            )
        yield f"line {number}", {key.strip().lower(): value for key, value in record.items()}


def _row(path: Path, place: str, record: Mapping[str, Any]) -> Row:
    where = f"{printable(path.name)}, {place}"
    file, labels, role = (_cell(record, column) for column in ("file", "labels", "role"))
    if not isinstance(file, str) or not file.strip():
        raise UsageError(f"{where}: no file is named.")
    found = _labels(labels, where, whole=path.suffix.lower() in JSON_LINES)
    if not found:
        raise UsageError(
            f"{where}: {printable(file.strip())} has no labels; give it one, or take the image out."
        )
    return Row(file.strip(), found, _role(role, where), place)


def _cell(record: Mapping[str, Any], column: str) -> Any:
    return next((record[name] for name in COLUMNS[column] if record.get(name) is not None), None)


def _labels(given: Any, where: str, *, whole: bool) -> tuple[str, ...]:
    """The different labels in a cell, in its order; ``whole``: a text is one label."""
    if given is None:
        return ()
    if isinstance(given, str):
        given = [given] if whole else given.split(SEPARATOR)
    given = given if isinstance(given, list) else [given]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in given):
        raise UsageError(f'{where}: labels are texts, as in ["cat", "dog"].')
    return tuple(dict.fromkeys(text for one in given if (text := printable(str(one).strip()))))


def _role(given: Any, where: str) -> Role | None:
    word = str(given).strip().lower() if given is not None else ""
    if not word:
        return None
    if word not in ROLE_FOLDERS:
        raise UsageError(f"{where}: there is no split '{printable(word)}'; say {', '.join(ROLE_FOLDERS)}.")
    return ROLE_FOLDERS[word]
