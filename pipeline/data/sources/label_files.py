"""A data set that is a labels file: a table, JSON lines, or COCO's annotations, and the images it names."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import UsageError
from ..coco import read_coco
from ..content import Labels, Walk, hashed
from ..dataset import ImageSet, Progress, Role, printable
from ..given import Given
from ..label_rows import JSON_LINES, TABLES, Row, read_rows
from ..splits import listed
from .folders import ROLE_FOLDERS

COCO = ".json"
SUFFIXES = (*TABLES, *sorted(JSON_LINES), COCO)
_TRAIN = re.compile(r"(?<![a-z])(training|train)(?![a-z])", re.IGNORECASE)


def open_label_file(
    path: Path,
    *,
    data_dir: Path | None = None,
    select_fraction: float | None = None,
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
    return read_label_file(path, data_dir=data_dir, progress=progress).assembled(select_fraction)


def read_label_file(
    path: Path, *, data_dir: Path | None = None, to_learn: bool = True, progress: Progress | None = None
) -> Given:
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
    multi_label = any(one.multi_label for one in read.values())
    found = {role: one.located(walk) for role, one in read.items()}
    by_role = _by_role(found, files, to_learn)
    classes = _classes(list(read.values()))
    if to_learn and len(classes) < 2 and not multi_label:
        raise UsageError(
            f"{printable(str(path))} has only one class, '{classes[0]}'; two or more can be told apart."
        )
    if to_learn:
        _check_trained(classes, by_role, printable(path.name))
    number = {name: label for label, name in enumerate(classes)}
    numbered: dict[Role, list[tuple[Path, Labels]]] = {
        role: [
            (file, tuple(number[name] for name in row.labels) if multi_label else number[row.labels[0]])
            for file, row in rows.items()
        ]
        for role, rows in by_role.items()
    }
    return Given(
        printable(_home(path).resolve().name),
        printable(str(path)),
        tuple(classes),
        hashed(numbered, walk, progress),
        has_roles=len(files) > 1 or any(row.role for one in read.values() for row in one.rows),
        skipped=tuple(walk.skipped),
        multi_label=multi_label,
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
        self.multi_label = self.coco or any(len(row.labels) > 1 for row in self.rows)

    def located(self, walk: Walk) -> dict[Path, Row]:
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

    def _folder(self, walk: Walk) -> Path:
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


def _walk(top: Path) -> Walk:
    top = Path(os.path.normpath(top.absolute()))
    return Walk(top.resolve(), top)


def _with_its_like(path: Path) -> dict[Role, Path]:
    """The labels file and, where its name says train, those for the other roles beside it."""
    files: dict[Role, Path] = {"train": path}
    word = _TRAIN.search(path.stem)
    if word is None:
        return files
    for other, role in ROLE_FOLDERS.items():
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
    found: Mapping[Role, dict[Path, Row]], files: Mapping[Role, Path], to_learn: bool
) -> dict[Role, dict[Path, Row]]:
    """The images of each role, by the files' names or by what the one file says of each."""
    by_role: dict[Role, dict[Path, Row]] = {}
    for named, rows in found.items():
        for file, row in rows.items():
            if row.role is not None and len(files) > 1:
                raise UsageError(
                    f"'{files[named].name}' gives its images a split, and stands beside "
                    f"{listed([one.name for role, one in files.items() if role != named])}; leave one of "
                    "the two out."
                )
            by_role.setdefault(row.role or named, {})[file] = row
    if to_learn and "train" not in by_role:
        raise UsageError("The labels file has no image to train on; give some the split 'train'.")
    if "test" not in by_role and "select" in by_role:
        by_role["test"] = by_role.pop("select")
    return by_role


def _classes(read: Sequence[_Read]) -> list[str]:
    """Those that an image has: sorted by name, or in the order of COCO's categories."""
    seen = {name for one in read for row in one.rows for name in row.labels}
    listed_in_order = [name for one in read for name in one.classes or ()]
    return [name for name in dict.fromkeys(listed_in_order) if name in seen] or sorted(seen)


def _check_trained(classes: Iterable[str], by_role: Mapping[Role, dict[Path, Row]], name: str) -> None:
    """
    Raises:
        UsageError: a class is seen in another role than train alone.
    """
    shown = {role: {one for row in rows.values() for one in row.labels} for role, rows in by_role.items()}
    for role, what in (("test", "testing"), ("select", "selecting")):
        only = [one for one in classes if one in shown.get(role, ()) and one not in shown["train"]]  # type: ignore[call-overload]
        if only:
            raise UsageError(
                f"{name} has images of {listed(only)} for {what} alone; a class needs images to train on."
            )
