"""Data sets described by a labels file: a table, JSON lines or COCO annotations, and the images it names."""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..dataset import Progress, Split, printable
from ..splits import UnsplitDataset, quote_names
from .folders import SPLIT_FOLDERS, FolderScan, Labels, hash_files

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
COCO = ".json"
SUFFIXES = (*DELIMITERS, *JSON_LINES, COCO)

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

_TRAIN = re.compile(r"(?<![a-z])(training|train)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """The labels of one image; ``place`` is its position in the labels file, such as ``line 7``."""

    file: str
    labels: tuple[str, ...]
    split: Split | None
    place: str


def read_label_file(
    path: Path, *, data_dir: Path | None = None, for_training: bool = True, progress: Progress | None = None
) -> UnsplitDataset:
    """Read the images that a labels file names, with the splits that it assigns.

    A ``.csv`` or ``.tsv`` has a header with a column of files (``file``, ``filename``, ``image``, ``path``),
    one of labels (``labels``, ``label``, ``tags``, ``class``; several in a cell separated by ``;``) and
    optionally one of splits (``split``: train, val, test). A ``.jsonl`` or ``.ndjson`` has an object with
    these keys in each line; a ``.json`` is COCO's. A file named after train is read together with those next
    to it for val and test: ``instances_train2017.json`` and ``instances_val2017.json``.

    If an image has several labels, and with COCO always, the set is multi-label. Classes are sorted by name,
    COCO's by id; COCO's categories without annotations are left out.

    ``data_dir`` is the folder of the images, by default that of the labels file. COCO's are also searched in
    ``images``, and in folders named after their split (``train2017``). Nothing outside of it is read. Without
    ``for_training``, the images are only validated on.

    Raises:
        UsageError: the file is not of this form, names missing images, or its classes do not match.
    """
    paths = _find_split_files(path)
    files: dict[Split, _LabelFile] = {}
    for split, file in paths.items():
        try:
            files[split] = _LabelFile(file)
        except UsageError as error:
            if file == path:
                raise
            reason = f"(It is read because it is next to {printable(path.name)}.)"
            raise UsageError(f"{error} {reason}") from error
    top = data_dir if data_dir is not None else _default_folder(path)
    if not top.is_dir():
        raise UsageError(f"--data-dir must be the folder of the images, got {printable(str(top))}.")
    top = Path(os.path.normpath(top.absolute()))
    scan = FolderScan(top.resolve(), top)
    multi_label = any(file.multi_label for file in files.values())
    images = _group_by_split({split: file.locate(scan) for split, file in files.items()}, paths, for_training)
    used = {name for file in files.values() for row in file.rows for name in row.labels}
    categories = dict.fromkeys(name for file in files.values() for name in file.categories)
    classes = [name for name in categories if name in used] or sorted(used)
    if for_training:
        if len(classes) < 2 and not multi_label:
            raise UsageError(f"{printable(str(path))} has only one class, '{classes[0]}'. Two are required.")
        trained = {label for row in images["train"].values() for label in row.labels}
        if untrained := [label for label in classes if label not in trained]:
            raise UsageError(
                f"{printable(path.name)} has images of {quote_names(untrained)}, but none to train on. "
                "Add some."
            )
    number = {name: label for label, name in enumerate(classes)}
    labeled: dict[Split, list[tuple[Path, Labels]]] = {
        split: [
            (file, tuple(number[name] for name in row.labels) if multi_label else number[row.labels[0]])
            for file, row in rows.items()
        ]
        for split, rows in images.items()
    }
    return UnsplitDataset(
        printable(_default_folder(path).resolve().name),
        printable(str(path)),
        classes,
        hash_files(labeled, scan, progress),
        has_splits=len(files) > 1 or any(row.split for file in files.values() for row in file.rows),
        skipped=scan.skipped,
        task="multi-label" if multi_label else "classification",
    )


def find_label_files(folder: Path) -> list[str]:
    """Return up to three paths of likely labels files in a folder, or in its ``annotations``."""
    try:
        files = [file for place in (folder, folder / "annotations") for file in sorted(place.glob("*.*"))]
    except OSError:
        return []
    likely = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return [printable(str(file)) for file in likely[:3]]


class _LabelFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_coco = path.suffix.lower() == COCO
        self.rows, self.categories = read_coco(path) if self.is_coco else (read_rows(path), [])
        self.multi_label = self.is_coco or any(len(row.labels) > 1 for row in self.rows)

    def locate(self, scan: FolderScan) -> dict[Path, Row]:
        """Return the rows by the image's file; files outside of the folder raise UsageError."""
        name, folder = printable(self.path.name), self._folder(scan)
        rows: dict[Path, Row] = {}
        missing: list[Row] = []
        for row in self.rows:
            file = Path(os.path.normpath(folder / row.file))
            if not file.is_relative_to(scan.top):
                raise UsageError(
                    f"{name}, {row.place}: {printable(row.file)} is outside of {printable(str(scan.top))}. "
                    "Use --data-dir for the folder of the images."
                )
            if file in rows:
                other = rows[file]
                if row.split == other.split and set(row.labels) == set(other.labels):
                    continue
                what = "labels" if set(row.labels) != set(other.labels) else "splits"
                raise UsageError(
                    f"{name} has {printable(row.file)} in {other.place} and in {row.place} with different "
                    f"{what}. Keep one of them, with all labels."
                )
            if not _is_file(file):
                missing.append(row)
            elif not file.resolve().is_relative_to(scan.root):
                scan.skip(file, "a link that leads out of the data folder")
            else:
                rows[file] = row
        if missing:
            raise UsageError(
                f"{name}: {len(missing)} of {len(self.rows)} images are not in {printable(str(folder))}, "
                f"first {printable(missing[0].file)} ({missing[0].place}). Use --data-dir for the folder of "
                "the images."
            )
        return rows

    def _folder(self, scan: FolderScan) -> Path:
        """Return the folder of the images: for COCO, the first candidate that contains the first image."""
        if not self.is_coco:
            return scan.top
        split = self.path.stem.rpartition("_")[2]
        candidates = [scan.top / part for part in ("", split, "images", f"images/{split}")]
        return next((folder for folder in candidates if _is_file(folder / self.rows[0].file)), scan.top)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _default_folder(path: Path) -> Path:
    folder = path.absolute().parent
    return folder.parent if folder.name.lower() == "annotations" else folder


def _find_split_files(path: Path) -> dict[Split, Path]:
    """Return the labels file and, if it is named after train, those for the other splits next to it."""
    files: dict[Split, Path] = {"train": path}
    word = _TRAIN.search(path.stem)
    if word is None:
        return files
    for name, split in SPLIT_FOLDERS.items():
        other = path.with_name(path.stem[: word.start()] + name + path.stem[word.end() :] + path.suffix)
        if split == "train" or not other.is_file():
            continue
        if split in files:
            raise UsageError(
                f"'{files[split].name}' and '{other.name}' are the same split. Keep one of them."
            )
        files[split] = other
    return files


def _group_by_split(
    rows_of: Mapping[Split, dict[Path, Row]], files: Mapping[Split, Path], for_training: bool
) -> dict[Split, dict[Path, Row]]:
    """Return the images of each split, by the labels files' names or by their rows."""
    images: dict[Split, dict[Path, Row]] = {}
    for file_split, rows in rows_of.items():
        for file, row in rows.items():
            if row.split is not None and len(files) > 1:
                others = quote_names([path.name for split, path in files.items() if split != file_split])
                raise UsageError(
                    f"'{files[file_split].name}' assigns splits to its images, but is next to {others}. "
                    "Remove one of the two."
                )
            images.setdefault(row.split or file_split, {})[file] = row
    if for_training and "train" not in images:
        raise UsageError("The labels file has no image in the split 'train'. Assign it to some.")
    if "test" not in images and "val" in images:
        images["test"] = images.pop("val")
    return images


def read_rows(path: Path) -> list[Row]:
    """Read a table or JSON lines.

    Raises:
        UsageError: the file is not of its form, or a row lacks a file, labels or a split.
    """
    name, text, is_table = printable(path.name), _read_text(path), path.suffix.lower() in DELIMITERS
    records = _read_table(path, text) if is_table else _read_json_lines(path, text)
    rows = [_parse_row(f"{name}, {place}", place, record, is_table) for place, record in records]
    if not rows:
        raise UsageError(f"{name} contains no images. Write a line for each image.")
    unassigned = [row for row in rows if row.split is None]
    if 0 < len(unassigned) < len(rows):
        raise UsageError(
            f"{name} assigns a split to {len(rows) - len(unassigned)} of its {len(rows)} images, but not to "
            f"the one in {unassigned[0].place}. Assign a split to all images or to none."
        )
    return rows


def _read_text(path: Path) -> str:
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
    file, labels, split = (
        next((record[name] for name in names if record.get(name) is not None), None)
        for names in COLUMNS.values()
    )
    if not isinstance(file, str) or not file.strip():
        raise UsageError(f"{location}: the file name is missing.")
    parsed = _parse_labels(labels, location, is_table)
    if not parsed:
        raise UsageError(f"{location}: {printable(file.strip())} has no labels. Add one or remove the image.")
    word = str(split).strip().lower() if split is not None else ""
    if word and word not in SPLIT_FOLDERS:
        raise UsageError(
            f"{location}: the split must be one of {', '.join(SPLIT_FOLDERS)}, got '{printable(word)}'."
        )
    return Row(file.strip(), parsed, SPLIT_FOLDERS.get(word), place)


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


def read_coco(path: Path) -> tuple[list[Row], list[str]]:
    """Return the images with the names of their categories, and all categories in the order of their ids.

    An image without annotations has no categories.

    Raises:
        UsageError: the file is not a COCO annotations file, or refers to images or categories it lacks.
    """
    name = printable(path.name)
    try:
        content = json.loads(
            _read_text(path), object_hook=lambda entry: {key: entry[key] for key in _COCO_KEYS & entry.keys()}
        )
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
