"""Data sets described by a labels file: a table, JSON lines or COCO annotations, and the images it names."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...config import TaskName
from ...errors import UsageError
from ..dataset import Progress, Split, printable
from ..splits import UnsplitDataset, quote_names
from .box_rows import attach_boxes, clean_rows
from .coco import read_coco
from .folders import EXTENSIONS, FolderScan, Labels, hash_files, mention
from .label_rows import DELIMITERS, JSON_LINES, Row, read_rows
from .split_names import SPLIT_WORDS, find_splits

COCO = ".json"
SUFFIXES = (*DELIMITERS, *JSON_LINES, COCO)

_TRAIN = re.compile(r"(?<![a-z])(training|train)(?![a-z])", re.IGNORECASE)


def read_label_file(
    path: Path,
    *,
    data_dir: Path | None = None,
    follow_links: bool = False,
    for_training: bool = True,
    with_boxes: bool = False,
    progress: Progress | None = None,
) -> UnsplitDataset:
    """Read the images that a labels file names, with the splits that it assigns.

    A ``.csv`` or ``.tsv`` has a header with a column of files (``file``, ``filename``, ``image``, ``path``),
    one of labels (``labels``, ``label``, ``tags``, ``class``; several in a cell separated by ``;`` or ``|``,
    or written as a list) and optionally one of splits (``split``: train, val, test). A ``.jsonl`` or
    ``.ndjson`` has an object with these keys in each line; a ``.json`` is COCO's. A file named after train is
    read together with those next to it for val and test: ``instances_train2017.json`` and
    ``instances_val2017.json``. A file in a folder named after train is read together with those of the same
    name in the folders of other splits.

    If an image has several labels, and with COCO always, the set is multi-label. Classes are sorted by name,
    COCO's by id; COCO's categories without annotations are left out. ``with_boxes`` reads the boxes of COCO's
    annotations, for detection.

    ``data_dir`` is the folder of the images, by default that of the labels file. COCO's are also searched in
    ``images``, and in folders named after their split (``train2017``). Nothing outside of it is read,
    except links with ``follow_links``. Without ``for_training``, the images are only validated on.

    Raises:
        UsageError: the file is not of this form, names missing images, or its classes do not match.
    """
    paths = _find_split_files(path)
    files: dict[Split, _LabelFile] = {}
    for split, file in paths.items():
        try:
            files[split] = _LabelFile(file, with_boxes)
        except UsageError as error:
            if file == path:
                raise
            reason = f"(It is read because it is next to {printable(path.name)}.)"
            raise UsageError(f"{error} {reason}") from error
    folder = Path(os.path.commonpath([_default_folder(file) for file in paths.values()]))
    top = data_dir if data_dir is not None else folder
    if not top.is_dir():
        raise UsageError(f"--data-dir must be the folder of the images, got {printable(str(top))}.")
    top = Path(os.path.normpath(top.absolute()))
    scan = FolderScan(top.resolve(), top, follow_links)
    multi_label = any(file.multi_label for file in files.values())
    located = {split: file.locate(scan, data_dir) for split, file in files.items()}
    if scan.links and not any(located.values()):
        raise mention(UsageError(f"{printable(str(path))}: none of its images is read."), scan.notes)
    images = _group_by_split(located, paths, for_training)
    notes = [*scan.notes, *_describe_unused(path, files.values(), images.values(), scan)]
    used = {name for file in files.values() for row in file.rows for name in row.labels}
    if with_boxes:
        images, more = clean_rows(images, scan)
        notes += more
        used = {name for rows in images.values() for row in rows.values() for name in row.labels}
    categories = dict.fromkeys(name for file in files.values() for name in file.categories)
    return label_images(
        path,
        printable(folder.resolve().name),
        [name for name in categories if name in used] or sorted(used),
        images,
        scan,
        has_splits=len(files) > 1 or any(row.split for file in files.values() for row in file.rows),
        task="detection" if with_boxes else "multi-label" if multi_label else "classification",
        notes=notes,
        for_training=for_training,
        progress=progress,
    )


def label_images(
    path: Path,
    name: str,
    classes: Sequence[str],
    images: Mapping[Split, Mapping[Path, Row]],
    scan: FolderScan,
    *,
    has_splits: bool,
    task: TaskName,
    notes: Sequence[str],
    for_training: bool,
    progress: Progress | None,
) -> UnsplitDataset:
    """Return the data set of the images by split and file, whose rows name classes.

    Raises:
        UsageError: there are too few classes, or the training images lack one.
    """
    if for_training:
        if not classes:
            raise mention(UsageError(f"{printable(str(path))} has no boxes to train on."), notes)
        if len(classes) < 2 and task == "classification":
            raise UsageError(f"{printable(str(path))} has only one class, '{classes[0]}'. Two are required.")
        trained = {label for row in images["train"].values() for label in row.labels}
        if untrained := [label for label in classes if label not in trained]:
            raise UsageError(
                f"{printable(path.name)} has images of {quote_names(untrained)}, but none to train on. "
                "Add some."
            )
    number = {label: position for position, label in enumerate(classes)}
    labeled: dict[Split, list[tuple[Path, Labels]]] = {
        split: [
            (
                file,
                number[row.labels[0]]
                if task == "classification"
                else tuple(number[label] for label in row.labels),
            )
            for file, row in rows.items()
        ]
        for split, rows in images.items()
    }
    hashed = hash_files(labeled, scan, progress)
    if task == "detection":
        hashed = {split: attach_boxes(hashed[split], rows, number) for split, rows in images.items()}
    return UnsplitDataset(
        name,
        printable(str(path)),
        classes,
        hashed,
        has_splits,
        skipped=scan.skipped,
        task=task,
        notes=notes,
    )


def _describe_unused(
    path: Path, files: Iterable["_LabelFile"], images: Iterable[Mapping[Path, Row]], scan: FolderScan
) -> list[str]:
    """Return notes on labels files of other splits, categories and images that are not used."""
    notes = []
    others = [file.name for file in path.parent.glob(f"*{path.suffix}") if file != path]
    splits = find_splits([path.stem, *(Path(name).stem for name in others)])
    folders = _find_split_folders(path)
    if splits.get(path.stem, "train") != "train":
        unused = [name for name in others if Path(name).stem in splits]
    else:
        is_other = folders.get(path.parent.name, "train") != "train"
        unused = [f"{name}/{path.name}" for name in folders if is_other and name != path.parent.name]
    if unused:
        notes.append(
            f"not used, although next to {printable(path.name)}: {quote_names(unused)}; use the file of "
            "train for all of them"
        )
    if unannotated := sorted({name for file in files for name in file.unannotated}):
        notes.append(f"categories without annotations are left out: {quote_names(unannotated)}")
    listed = {file for rows in images for file in rows} | {scan.top / file.name for file in scan.skipped}
    unlisted = sorted(
        file
        for folder in {file.parent for file in listed}
        for file in folder.glob("[!.]*")
        if file not in listed and file.suffix.lower() in EXTENSIONS
    )
    if unlisted:
        notes.append(
            f"{len(unlisted):,} images next to those of {printable(path.name)} are not in it, such as "
            f"{scan.name(unlisted[0])}"
        )
    return notes


def find_label_files(folder: Path) -> list[str]:
    """Return up to three paths of likely labels files in a folder, or in its ``annotations``."""
    try:
        files = [file for place in (folder, folder / "annotations") for file in sorted(place.glob("*.*"))]
    except OSError:
        return []
    likely = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return [printable(str(file)) for file in likely[:3]]


class _LabelFile:
    def __init__(self, path: Path, with_boxes: bool) -> None:
        self.path = path
        self.is_coco = path.suffix.lower() == COCO
        if with_boxes and not self.is_coco:
            raise UsageError(f"{printable(path.name)} has labels, and no boxes, which a detector requires.")
        self.rows, self.categories, self.unannotated = (
            read_coco(path, with_boxes=with_boxes) if self.is_coco else (read_rows(path), [], [])
        )
        self.multi_label = self.is_coco or any(len(row.labels) > 1 for row in self.rows)

    def locate(self, scan: FolderScan, data_dir: Path | None) -> dict[Path, Row]:
        """Return the rows by the image's file; files outside of the folder raise UsageError."""
        name = printable(self.path.name)
        folder = self._folder(scan.top if data_dir is not None else _default_folder(self.path))
        rows: dict[Path, Row] = {}
        missing: list[Row] = []
        for row in self.rows:
            file = find_file(folder, row.file)
            if not file.is_relative_to(scan.top):
                raise UsageError(
                    f"{name}, {row.place}: {printable(row.file)} is outside of {printable(str(scan.top))}. "
                    "Use --data-dir for the folder of the images."
                )
            if file in rows:
                other = rows[file]
                same = set(row.labels) == set(other.labels) and row.boxes == other.boxes
                if row.split == other.split and same:
                    continue
                what = "splits" if same else "labels"
                raise UsageError(
                    f"{name} has {printable(row.file)} in {other.place} and in {row.place} with different "
                    f"{what}. Keep one of them, with all labels."
                )
            if not _is_file(file):
                missing.append(row)
            elif not scan.leads_out(file):
                rows[file] = row
        if missing:
            raise UsageError(
                f"{name}: {len(missing)} of {len(self.rows)} images are not in {printable(str(folder))}, "
                f"first {printable(missing[0].file)} ({missing[0].place}). Use --data-dir for the folder of "
                "the images."
            )
        return rows

    def _folder(self, top: Path) -> Path:
        """Return the folder of the images: for COCO, the first candidate that contains the first image."""
        if not self.is_coco:
            return top
        split = self.path.stem.rpartition("_")[2]
        candidates = [top / part for part in ("", split, "images", f"images/{split}")]
        return next((f for f in candidates if _is_file(find_file(f, self.rows[0].file))), top)


def find_file(folder: Path, name: str) -> Path:
    """Return the path of a file, also if its name has Windows separators or another Unicode form."""
    slashes = name.replace("\\", "/")
    forms = (name, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")))
    paths = [Path(os.path.normpath(folder / form)) for form in dict.fromkeys(forms)]
    return next((path for path in paths if _is_file(path)), paths[0])


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
        folders = _find_split_folders(path)
        if folders.get(path.parent.name) == "train":
            files |= {split: path.parent.with_name(name) / path.name for name, split in folders.items()}
        return files
    for name, split in SPLIT_WORDS.items():
        other = path.with_name(path.stem[: word.start()] + name + path.stem[word.end() :] + path.suffix)
        if split == "train" or not other.is_file():
            continue
        if split in files:
            raise UsageError(
                f"'{files[split].name}' and '{other.name}' are the same split. Keep one of them."
            )
        files[split] = other
    return files


def _find_split_folders(path: Path) -> dict[str, Split]:
    """Return the split folders that contain a file of this name, if it is in one of them."""
    folder = path.absolute().parent
    try:
        names = [other.name for other in folder.parent.iterdir() if (other / path.name).is_file()]
    except OSError:
        return {}
    splits = find_splits(names)
    return splits if folder.name in splits else {}


def find_split_label_file(folder: Path) -> Path | None:
    """Return the labels file of train if the folders of the splits have no class folders.

    It is in the train folder, or named after the split in ``folder``, next to those of other splits.
    """
    try:
        entries = sorted(folder.iterdir())
        folders = [path for path in entries if path.is_dir()]
        splits = find_splits(path.name for path in folders)
        train = next((path for path in folders if splits.get(path.name) == "train"), None)
        if train is None or any(path.is_dir() for path in train.iterdir()):
            return None
        files = [path for path in entries if path.suffix.lower() in SUFFIXES]
        splits = find_splits(path.stem for path in files)
        named = [path for path in files if splits.get(path.stem) == "train"]
        if len(named) == 1 and len(splits) > 1:
            return named[0]
        files = [path for path in train.iterdir() if path.suffix.lower() in SUFFIXES]
    except OSError:
        return None
    return files[0] if len(files) == 1 and len(_find_split_folders(files[0])) > 0 else None


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
    return images
