"""Data sets described by a labels file: a table, JSON lines or COCO annotations, and the images it names."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UsageError
from ..dataset import Progress, Split, printable
from ..splits import UnsplitDataset, quote_names
from .folders import SPLIT_FOLDERS, FolderScan, Labels, hash_files
from .label_formats import DELIMITERS, JSON_LINES, Row, read_coco, read_rows

COCO = ".json"
SUFFIXES = (*DELIMITERS, *sorted(JSON_LINES), COCO)
_TRAIN = re.compile(r"(?<![a-z])(training|train)(?![a-z])", re.IGNORECASE)


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
    files = {split: _read(file, path) for split, file in paths.items()}
    top = data_dir if data_dir is not None else _default_folder(path)
    if not top.is_dir():
        raise UsageError(f"--data-dir must be the folder of the images, got {printable(str(top))}.")
    top = Path(os.path.normpath(top.absolute()))
    scan = FolderScan(top.resolve(), top)
    multi_label = any(file.multi_label for file in files.values())
    images = _group_by_split({split: file.locate(scan) for split, file in files.items()}, paths, for_training)
    classes = _list_classes(list(files.values()))
    if for_training:
        if len(classes) < 2 and not multi_label:
            raise UsageError(f"{printable(str(path))} has only one class, '{classes[0]}'. Two are required.")
        _check_trained(classes, images, printable(path.name))
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
        tuple(classes),
        hash_files(labeled, scan, progress),
        has_splits=len(files) > 1 or any(row.split for file in files.values() for row in file.rows),
        skipped=tuple(scan.skipped),
        task="multi-label" if multi_label else "classification",
    )


def is_label_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def find_label_files(folder: Path) -> list[str]:
    """Return up to three paths of likely labels files in a folder, or in its ``annotations``."""
    try:
        files = [file for place in (folder, folder / "annotations") for file in sorted(place.glob("*.*"))]
    except OSError:
        return []
    likely = [file for file in files if is_label_file(file) and not file.name.startswith(".")]
    return [printable(str(file)) for file in likely[:3]]


class _LabelFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_coco = path.suffix.lower() == COCO
        self.rows: list[Row]
        self.categories: list[str] = []
        if self.is_coco:
            self.rows, self.categories = read_coco(path)
        else:
            self.rows = read_rows(path)
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
                self._check_same(row, rows[file])
            elif not _is_file(file):
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

    def _check_same(self, row: Row, other: Row) -> None:
        if set(row.labels) != set(other.labels) or row.split != other.split:
            what = "labels" if set(row.labels) != set(other.labels) else "splits"
            raise UsageError(
                f"{printable(self.path.name)} has {printable(row.file)} in {other.place} and in {row.place} "
                f"with different {what}. Keep one of them, with all labels."
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _read(path: Path, requested: Path) -> _LabelFile:
    try:
        return _LabelFile(path)
    except UsageError as error:
        if path == requested:
            raise
        raise UsageError(
            f"{error} (It is read because it is next to {printable(requested.name)}.)"
        ) from error


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


def _list_classes(files: Sequence[_LabelFile]) -> list[str]:
    """Return the classes that have images: in the order of COCO's categories, or sorted by name."""
    used = {name for file in files for row in file.rows for name in row.labels}
    categories = dict.fromkeys(name for file in files for name in file.categories)
    return [name for name in categories if name in used] or sorted(used)


def _check_trained(classes: Sequence[str], images: Mapping[Split, dict[Path, Row]], name: str) -> None:
    """Raise UsageError for a class without training images."""
    trained = {label for row in images["train"].values() for label in row.labels}
    untrained = [label for label in classes if label not in trained]
    if untrained:
        raise UsageError(f"{name} has images of {quote_names(untrained)}, but none to train on. Add some.")
