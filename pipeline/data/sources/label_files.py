"""A data set that is a labels file: a table, JSON lines, or COCO's annotations, and the images it names."""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..dataset import ImageSet, Labels, Progress, Split, FolderScan, hash_files, printable
from ..splits import UnsplitDataset, quote_names
from .folders import SPLIT_FOLDERS

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
    role: Split | None
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


def _role(given: Any, where: str) -> Split | None:
    word = str(given).strip().lower() if given is not None else ""
    if not word:
        return None
    if word not in SPLIT_FOLDERS:
        raise UsageError(f"{where}: there is no split '{printable(word)}'; say {', '.join(SPLIT_FOLDERS)}.")
    return SPLIT_FOLDERS[word]


# Of a file of half a gigabyte that is mostly outlines, what we keep while it is read.
_KEPT = frozenset(
    ("images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id")
)


def read_coco(path: Path) -> tuple[list[Row], list[str]]:
    """The images with the names of their categories (an image without annotations has none), and the names of
    all categories in the order of their numbers.

    Raises:
        UsageError: the file is no COCO annotations file, or names what it does not hold.
    """
    name = printable(path.name)
    try:
        content = json.loads(read_text(path), object_hook=_kept)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {error}.") from error
    parts = {part: content.get(part) if isinstance(content, dict) else None for part in _PARTS}
    if not all(isinstance(part, list) for part in parts.values()):
        raise UsageError(
            f"{name} is no COCO annotations file, which has lists of {', '.join(_PARTS)}; a labels file of "
            "another kind is a .csv or .jsonl."
        )
    categories = _by_number(name, "categories", "name", parts["categories"])
    names = {number: printable(one) for number, one in categories.items()}
    if len(set(names.values())) < len(names):
        twice = next(one for one in names.values() if list(names.values()).count(one) > 1)
        raise UsageError(f"{name} has two categories named '{twice}'; give each a name of its own.")
    files = _by_number(name, "images", "file_name", parts["images"])
    shown: dict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        image, category = (
            annotation.get(key) if isinstance(annotation, dict) else None
            for key in ("image_id", "category_id")
        )
        known = isinstance(image, int) and image in files
        if not known or not isinstance(category, int) or category not in names:
            missing = printable(f"category {category}" if known else f"image {image}")[:80]
            raise UsageError(f"{name} has an annotation of {missing}, which it does not list.")
        shown[image].add(category)
    if not shown:
        raise UsageError(f"{name} has no annotations; there is nothing to learn from it.")
    rows = [
        Row(file, tuple(names[c] for c in sorted(shown.get(number, ()))), None, f"image {number}")
        for number, file in files.items()
    ]
    return rows, [names[number] for number in sorted(names)]


_PARTS = ("images", "annotations", "categories")


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _KEPT & entry.keys()}


def _by_number(name: str, part: str, key: str, entries: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UsageError(f"{name}: one of its {part} has no number 'id' or no '{key}'.")
        if number in found:
            raise UsageError(f"{name}: two of its {part} have the id {number}.")
        found[number] = entry[key].strip()
    return found


COCO = ".json"
SUFFIXES = (*TABLES, *sorted(JSON_LINES), COCO)
_TRAIN = re.compile(r"(?<![a-z])(training|train)(?![a-z])", re.IGNORECASE)


def open_label_file(
    path: Path,
    *,
    data_dir: Path | None = None,
    val_fraction: float | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The image set of a labels file.

    A ``.csv`` or ``.tsv`` has a header with a column of files (``file``, ``filename``, ``image``, ``path``),
    one of labels (``labels``, ``label``, ``tags``, ``class``; several in a cell with ``;`` between them) and
    perhaps one of roles (``split``, ``role``: train, val, test); a ``.jsonl`` or ``.ndjson`` has an object
    with these keys in each line; a ``.json`` is COCO's. A file named after train brings those beside it that
    are named alike after val and test: ``instances_train2017.json`` and ``instances_val2017.json``.

    Where an image has several labels, and with COCO always, the set is a multi-label one; a table with one
    label for each image is a set as class folders are. Classes are sorted by name, COCO's by number; COCO's
    categories without an annotation are left out.

    ``data_dir`` is the folder of the images; without it, the labels file's. COCO's are looked for there, in
    ``images``, and in folders named after their split (``train2017``), too. Nothing outside of it is read.

    Raises:
        UsageError: the file is not of this form, names images that are not there, or its classes don't fit.
    """
    return read_label_file(path, data_dir=data_dir, progress=progress).assembled(val_fraction)


def read_label_file(
    path: Path, *, data_dir: Path | None = None, to_learn: bool = True, progress: Progress | None = None
) -> UnsplitDataset:
    """The images that a labels file names, with the roles that it gives them.

    Without ``to_learn`` the images are for validation alone: none needs to be there to train on.

    Raises:
        UsageError: as ``open_label_file``.
    """
    files = _with_its_like(path)
    read = {role: _read(one, path) for role, one in files.items()}
    top = data_dir if data_dir is not None else _home(path)
    if not top.is_dir():
        raise UsageError(f"There is no folder {printable(str(top))}; --data-dir is the folder of the images.")
    walk = _walk(top)
    several = any(one.several for one in read.values())
    found = {role: one.located(walk) for role, one in read.items()}
    by_role = _by_role(found, files, to_learn)
    classes = _classes(list(read.values()))
    if to_learn and len(classes) < 2 and not several:
        raise UsageError(
            f"{printable(str(path))} has only one class, '{classes[0]}'; two or more can be told apart."
        )
    if to_learn:
        _check_trained(classes, by_role, printable(path.name))
    number = {name: label for label, name in enumerate(classes)}
    numbered: dict[Split, list[tuple[Path, Labels]]] = {
        role: [
            (file, tuple(number[name] for name in row.labels) if several else number[row.labels[0]])
            for file, row in rows.items()
        ]
        for role, rows in by_role.items()
    }
    return UnsplitDataset(
        printable(_home(path).resolve().name),
        printable(str(path)),
        tuple(classes),
        hash_files(numbered, walk, progress),
        has_roles=len(files) > 1 or any(row.role for one in read.values() for row in one.rows),
        skipped=tuple(walk.skipped),
        task="multi-label" if several else "classification",
    )


def is_label_file(path: Path) -> bool:
    """Whether a file's name says that it holds labels."""
    return path.suffix.lower() in SUFFIXES


def label_files_in(folder: Path) -> list[str]:
    """Up to three files in a folder, or in its ``annotations``, that may be labels files; as paths."""
    try:
        found = [one for place in (folder, folder / "annotations") for one in sorted(place.glob("*.*"))]
    except OSError:
        return []
    likely = [one for one in found if one.suffix.lower() in SUFFIXES and not one.name.startswith(".")]
    return [printable(str(one)) for one in likely[:3]]


class _Read:
    """A labels file that has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.coco = path.suffix.lower() == COCO
        self.rows: list[Row]
        self.classes: list[str] | None = None
        if self.coco:
            self.rows, self.classes = read_coco(path)
        else:
            self.rows = read_rows(path)
        self.several = self.coco or any(len(row.labels) > 1 for row in self.rows)

    def located(self, walk: FolderScan) -> dict[Path, Row]:
        """Each image's file and row.

        Raises:
            UsageError: a file is missing or outside of the folder, or is named twice with different labels.
        """
        name, folder = printable(self.path.name), self._folder(walk)
        found: dict[Path, Row] = {}
        missing: list[Row] = []
        for row in self.rows:
            file = Path(os.path.normpath(folder / row.file))
            if not file.is_relative_to(walk.top):
                raise UsageError(
                    f"{name}, {row.place}: {printable(row.file)} is not in {printable(str(walk.top))}, and "
                    "nothing outside of it is read; --data-dir names the folder of the images."
                )
            if file in found:
                self._check_same(row, found[file])
            elif not _is_file(file):
                missing.append(row)
            elif not file.resolve().is_relative_to(walk.root):
                walk.skip(file, "a link that leads out of the data folder")
            else:
                found[file] = row
        if missing:
            raise UsageError(
                f"{len(missing)} of the {len(self.rows)} images that {name} names are not in "
                f"{printable(str(folder))}; the first is {printable(missing[0].file)} ({missing[0].place}). "
                "--data-dir names the folder of the images."
            )
        return found

    def _folder(self, walk: FolderScan) -> Path:
        """Where the images are: for COCO's, the first likely folder that has the first image."""
        if not self.coco:
            return walk.top
        split = self.path.stem.rpartition("_")[2]
        likely = ["", split, "images", f"images/{split}"]
        here = [walk.top / part for part in likely if _is_file(walk.top / part / self.rows[0].file)]
        return here[0] if here else walk.top

    def _check_same(self, row: Row, other: Row) -> None:
        if set(row.labels) != set(other.labels) or row.role != other.role:
            what = "labels" if set(row.labels) != set(other.labels) else "splits"
            raise UsageError(
                f"{printable(self.path.name)} has {printable(row.file)} in {other.place} and in {row.place}, "
                f"with different {what}; write it once, with all its labels."
            )


def _is_file(path: Path) -> bool:
    """False too where no file could have this name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read(path: Path, asked: Path) -> _Read:
    try:
        return _Read(path)
    except UsageError as error:
        if path == asked:
            raise
        raise UsageError(f"{error} (It is read because it stands beside {printable(asked.name)}.)") from error


def _home(path: Path) -> Path:
    """The folder that a labels file is about."""
    folder = path.absolute().parent
    return folder.parent if folder.name.lower() == "annotations" else folder


def _walk(top: Path) -> FolderScan:
    top = Path(os.path.normpath(top.absolute()))
    return FolderScan(top.resolve(), top)


def _with_its_like(path: Path) -> dict[Split, Path]:
    """The labels file and, where its name says train, those for the other roles beside it."""
    files: dict[Split, Path] = {"train": path}
    word = _TRAIN.search(path.stem)
    if word is None:
        return files
    for other, role in SPLIT_FOLDERS.items():
        beside = path.with_name(path.stem[: word.start()] + other + path.stem[word.end() :] + path.suffix)
        if role == "train" or not beside.is_file():
            continue
        if role in files:
            raise UsageError(
                f"'{files[role].name}' and '{beside.name}' mean the same; keep one of the two files."
            )
        files[role] = beside
    return files


def _by_role(
    found: Mapping[Split, dict[Path, Row]], files: Mapping[Split, Path], to_learn: bool
) -> dict[Split, dict[Path, Row]]:
    """The images of each role, by the files' names or by what the one file says of each."""
    by_role: dict[Split, dict[Path, Row]] = {}
    for named, rows in found.items():
        for file, row in rows.items():
            if row.role is not None and len(files) > 1:
                raise UsageError(
                    f"'{files[named].name}' gives its images a split, and stands beside "
                    f"{quote_names([one.name for role, one in files.items() if role != named])}; leave one of "
                    "the two out."
                )
            by_role.setdefault(row.role or named, {})[file] = row
    if to_learn and "train" not in by_role:
        raise UsageError("The labels file has no image to train on; give some the split 'train'.")
    if "test" not in by_role and "val" in by_role:
        by_role["test"] = by_role.pop("val")
    return by_role


def _classes(read: Sequence[_Read]) -> list[str]:
    """Those that an image has: sorted by name, or in the order of COCO's categories."""
    seen = {name for one in read for row in one.rows for name in row.labels}
    listed_in_order = [name for one in read for name in one.classes or ()]
    return [name for name in dict.fromkeys(listed_in_order) if name in seen] or sorted(seen)


def _check_trained(classes: Iterable[str], by_role: Mapping[Split, dict[Path, Row]], name: str) -> None:
    """
    Raises:
        UsageError: a class is seen in another role than train alone.
    """
    shown = {role: {one for row in rows.values() for one in row.labels} for role, rows in by_role.items()}
    for role, what in (("test", "testing"), ("val", "selecting")):
        only = [one for one in classes if one in shown.get(role, ()) and one not in shown["train"]]  # type: ignore[call-overload]
        if only:
            raise UsageError(
                f"{name} has images of {quote_names(only)} for {what} alone; a class needs images to train on."
            )
