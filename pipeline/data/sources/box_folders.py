"""Folders of boxes: Pascal VOC's XML files, and YOLO's text files with a ``data.yaml``."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import yaml

from ...errors import UsageError
from ..boxes import FRACTIONS, NamedBox
from ..dataset import Progress, Split, printable
from ..splits import UnsplitDataset, quote_names
from .box_rows import clean_rows
from .folders import EXTENSIONS, FolderScan
from .label_files import find_file, label_images
from .label_rows import Row, clean_label, read_text
from .split_names import find_splits

Kind = Literal["Pascal VOC", "YOLO"]
YAML = (".yaml", ".yml")

_Rows = dict[Split, dict[Path, Row]]


def find_kind(path: Path, *, strict: bool = False) -> Kind | None:
    """Return the format of a folder of boxes, or of YOLO's ``data.yaml``; None if it is not one.

    Raises:
        UsageError: ``strict`` is set and an annotation file is not readable.
    """
    try:
        if (file := _find_yaml(path)) is not None:
            text = read_text(file)
            is_yolo = all(re.search(rf"^{key}\s*:", text, re.MULTILINE) for key in ("names", "train"))
            return "YOLO" if is_yolo else None
        return "Pascal VOC" if any(_find_xml_folders(path).values()) else None
    except (OSError, UsageError) as error:
        if strict and isinstance(error, UsageError):
            raise
        return None


def read_box_folder(
    path: Path,
    *,
    data_dir: Path | None = None,
    follow_links: bool = False,
    for_training: bool = True,
    progress: Progress | None = None,
) -> UnsplitDataset:
    """Read the images and boxes of a folder in one of two formats, with the splits that it assigns.

    - Pascal VOC: XML files in ``Annotations`` and images in ``JPEGImages``, with splits by
      ``ImageSets/Main/train.txt``; or XML files next to the images, possibly in folders named after splits.
      Boxes that are ``difficult`` are crowds.
    - YOLO: ``data.yaml`` with ``names`` and folders or lists of images as ``train``, ``val`` and ``test``,
      the text files in ``labels`` where the images are in ``images``. Outlines are read as their boxes.

    Nothing outside of the folder, or ``data_dir`` for a ``data.yaml``, is read, except links with
    ``follow_links``.

    Raises:
        UsageError: the folder is not of this form, or an annotation's image is missing.
    """
    file = _find_yaml(path)
    top = _normalize((data_dir or (path if file is None else file.parent)).absolute())
    scan = FolderScan(top.resolve(), top, follow_links)
    try:
        stated, categories = _read_voc(scan) if file is None else _read_yolo(file, scan)
        if for_training and not stated.get("train"):
            raise UsageError(f"{printable(str(path))} has no images to train on.")
    except OSError as error:
        name = printable(str(error.filename or path))
        raise UsageError(f"{name} cannot be read: {error.strerror or error}.") from error
    images, notes = clean_rows(stated, scan)
    used = {label for rows in images.values() for row in rows.values() for label in row.labels}
    return label_images(
        path,
        printable(top.resolve().name),
        [name for name in categories if name in used],
        images,
        scan,
        has_splits=len(images) > 1,
        task="detection",
        notes=[*scan.notes, *notes],
        for_training=for_training,
        progress=progress,
    )


def _find_yaml(path: Path) -> Path | None:
    """Return YOLO's file, by its name."""
    if path.is_file():
        return path if path.suffix.lower() in YAML else None
    return next((file for suffix in YAML if (file := path / f"data{suffix}").is_file()), None)


# Pascal VOC


def _find_xml_folders(path: Path) -> dict[Split, list[Path]]:
    """Return the folders with XML files: ``Annotations``, those of splits, or the folder itself."""
    folders: dict[Split, list[Path]] = {}
    if not path.is_dir():
        return folders
    splits = find_splits(folder.name for folder in path.iterdir() if folder.is_dir())
    if "train" in splits.values():
        for name, split in splits.items():
            folders.setdefault(split, []).extend(_with_xml(path / name))
    return folders if any(folders.values()) else {"train": _with_xml(path)}


def _with_xml(folder: Path) -> list[Path]:
    candidates = folder / "Annotations", folder / "annotations", folder
    first = {place: next(place.glob("[!.]*.xml"), None) for place in candidates}
    return [place for place, file in first.items() if file and "<annotation" in read_text(file)][:1]


def _read_voc(scan: FolderScan) -> tuple[_Rows, list[str]]:
    """Return the rows of the images, and all names of classes in order."""
    rows: _Rows = {}
    missing: list[Path] = []
    for split, folders in _find_xml_folders(scan.top).items():
        rows[split] = {}
        for folder in folders:
            root = folder.parent if folder.name.lower() == "annotations" else folder
            for file in sorted(folder.glob("[!.]*.xml")):
                if scan.leads_out(file):
                    continue
                row = _parse_xml(file)
                image = _find_voc_image(root, file, row.file)
                if image is None:
                    missing.append(file)
                elif image in rows[split]:
                    other = rows[split][image].place
                    raise UsageError(f"{other} and {row.place} are of the same image. Keep one of them.")
                elif not scan.leads_out(image):
                    rows[split][image] = row
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(missing) + sum(map(len, rows.values()))} annotations have no image in "
            f"JPEGImages or next to them, first {scan.name(missing[0])}."
        )
    if lists := _read_voc_lists(scan):
        rows = _assign_voc_splits(rows["train"], lists, scan)
    names = {box.name for by_file in rows.values() for row in by_file.values() for box in row.boxes or ()}
    return rows, sorted(names)


def _read_voc_lists(scan: FolderScan) -> dict[Split, set[str]]:
    """Return the names of images by split of ``ImageSets/Main``; empty without such lists."""
    folder = scan.top / "ImageSets" / "Main"
    lists: dict[Split, set[str]] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        if (file := folder / f"{split}.txt").is_file() and not scan.leads_out(file):
            lists[split] = {line.split()[0] for line in read_text(file).splitlines() if line.strip()}
    both = folder / "trainval.txt"
    if "train" not in lists and both.is_file() and not scan.leads_out(both):
        lists["train"] = {line.split()[0] for line in read_text(both).splitlines() if line.strip()}
        lists["train"] -= lists.get("val", set())
    return lists if "train" in lists else {}


def _assign_voc_splits(rows: Mapping[Path, Row], lists: Mapping[Split, set[str]], scan: FolderScan) -> _Rows:
    assigned: _Rows = {
        split: {file: row for file, row in rows.items() if Path(row.place).stem in names}
        for split, names in lists.items()
    }
    stems = {Path(row.place).stem for row in rows.values()}
    if absent := sorted(set().union(*lists.values()) - stems):
        raise UsageError(f"ImageSets/Main lists {quote_names(absent)}, which have no annotations.")
    if unlisted := len(stems - set().union(*lists.values())):
        scan.ignored["images that ImageSets/Main does not list"] += unlisted
    return assigned


def _find_voc_image(root: Path, file: Path, name: str) -> Path | None:
    """Return the image of an annotation: of the same name, or else of the one that it states."""
    folders = dict.fromkeys((root / "JPEGImages", root / "images", root, file.parent))
    for folder in folders:
        stated = find_file(folder, Path(name.replace("\\", "/")).name) if name else folder
        suffixes = dict.fromkeys((stated.suffix, *sorted(EXTENSIONS), *map(str.upper, sorted(EXTENSIONS))))
        for candidate in (*(folder / (file.stem + suffix) for suffix in suffixes if suffix), stated):
            if candidate.suffix.lower() in EXTENSIONS and candidate.is_file():
                return candidate
    return None


def _parse_xml(file: Path) -> Row:
    name, text = printable(file.name), read_text(file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UsageError(f"{name} declares entities, which annotations do not have. Remove them.")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(f"{name} is not XML: {error}.") from error
    # The numbers of VOC's own pixels start at 1.
    first = 1.0 if root.findtext("source/database", "").startswith("The VOC") else 0.0
    boxes = []
    for entry in root.iterfind("object"):
        label = clean_label(entry.findtext("name") or "")
        if not label:
            raise UsageError(f"{name} has an object without a name.")
        x1, y1, x2, y2 = (
            _parse_number(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        crowd = (entry.findtext("difficult") or "0").strip() not in ("0", "")
        boxes.append(NamedBox(label, x1 - first, y1 - first, x2, y2, None, crowd))
    tall, wide = (_parse_number(root.findtext(f"size/{key}")) for key in ("height", "width"))
    size = (tall, wide) if 0 < tall < math.inf and 0 < wide < math.inf else None
    return Row((root.findtext("filename") or "").strip(), (), None, name, tuple(boxes), size)


def _parse_number(text: str | None) -> float:
    """Return a number, NaN if it is missing or not one."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


# YOLO


def _read_yolo(file: Path, scan: FolderScan) -> tuple[_Rows, list[str]]:
    """Return the rows of the images, and the names of the classes in order."""
    shown = printable(file.name)
    try:
        content = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{shown} is not YAML: {' '.join(str(error).split())}.") from error
    names = content.get("names") if isinstance(content, dict) else None
    listed: Any = dict(enumerate(names)) if isinstance(names, list) else names
    is_valid = isinstance(listed, dict) and all(isinstance(key, int) for key in listed)
    if not is_valid or not all(isinstance(value, str | int | float) for value in listed.values()):
        raise UsageError(f"{shown} is not YOLO's: it lacks 'names', a list of classes.")
    classes = {key: clean_label(str(value)) for key, value in listed.items()}
    if len(set(classes.values())) < len(classes):
        raise UsageError(f"{shown}: two classes of 'names' have the same name. Rename one of them.")
    if not content.get("train"):
        raise UsageError(f"{shown} is not YOLO's: it lacks 'train', the folder of the training images.")
    base = content.get("path") or ""
    rows: _Rows = {}
    keys: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
    for split, words in keys.items():
        stated = next((content[word] for word in words if content.get(word)), None)
        if stated is None:
            continue
        places = stated if isinstance(stated, list) else [stated]
        if not all(isinstance(place, str) for place in (base, *places)):
            raise UsageError(f"{shown}: 'path' and '{words[0]}' must be folders, or lists of folders.")
        images = chain.from_iterable(_list_images(place, scan.top / base, shown, scan) for place in places)
        rows[split] = {image: _read_yolo_labels(image, classes, scan) for image in images}
    return rows, [classes[key] for key in sorted(classes)]


def _list_images(place: str, base: Path, shown: str, scan: FolderScan) -> Iterator[Path]:
    """Yield the images of a folder, at any depth, or of a list of files."""
    # Roboflow writes ../train/images for train/images.
    candidates = [base / place, scan.top / place, scan.top / place.removeprefix("../")]
    inside = [f for c in candidates if (f := _normalize(c)).is_relative_to(scan.top)]
    path = next((candidate for candidate in inside if candidate.exists()), None)
    if path is None:
        raise UsageError(
            f"{shown}: {printable(place)} is not in {printable(str(scan.top))}. Use --data-dir for the "
            "folder of the images."
        )
    if scan.leads_out(path):
        return
    files: Iterable[Path] = sorted(path.rglob("*"))
    if path.is_file():
        files = [
            _normalize(path.parent / line.strip()) for line in read_text(path).splitlines() if line.strip()
        ]
        absent = [f for f in files if not f.is_relative_to(scan.top) or not f.is_file()]
        if absent:
            raise UsageError(
                f"{printable(path.name)}: {len(absent)} images are not in {printable(str(scan.top))}, first "
                f"{printable(absent[0].name)}."
            )
    for file in files:
        is_image = file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
        if is_image and not scan.leads_out(file):
            yield file


def _normalize(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _read_yolo_labels(image: Path, classes: Mapping[int, str], scan: FolderScan) -> Row:
    """Return the row of an image; without a file of labels it shows nothing."""
    parts = list(image.relative_to(scan.top).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[last] = "labels"
    file = scan.top.joinpath(*parts).with_suffix(".txt")
    if not file.is_file() or scan.leads_out(file):
        return Row(image.name, (), None, image.name, (), FRACTIONS)
    boxes = tuple(
        _parse_yolo_line(f"{scan.name(file)}, line {number}", line.split(), classes)
        for number, line in enumerate(read_text(file).splitlines(), 1)
        if line.strip()
    )
    return Row(image.name, (), None, image.name, boxes, FRACTIONS)


def _parse_yolo_line(place: str, cells: Sequence[str], classes: Mapping[int, str]) -> NamedBox:
    is_outline = len(cells) >= 7 and len(cells) % 2 == 1
    if len(cells) != 5 and not is_outline:
        raise UsageError(
            f"{place}: {len(cells)} columns. A box has five: class, x and y of its center, width, height."
        )
    number, *values = map(_parse_number, cells)
    if number not in classes:
        raise UsageError(f"{place}: class {printable(cells[0])[:80]} is not in 'names' of data.yaml.")
    label = classes[int(number)]
    if is_outline:
        x, y = values[::2], values[1::2]
        finite = all(map(math.isfinite, values))
        corners = (min(x), min(y), max(x), max(y)) if finite else (math.nan,) * 4
    else:
        x_center, y_center, width, height = values
        corners = (
            x_center - width / 2, y_center - height / 2, x_center + width / 2, y_center + height / 2,
        )  # fmt: skip
    return NamedBox(label, *corners)
