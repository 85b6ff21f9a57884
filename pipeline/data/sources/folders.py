"""Folders of class folders, optionally inside train, val and test folders; image files hashed by content."""

import errno
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ....export.runtime import readable_formats
from ...errors import UsageError
from ..dataset import Image, Progress, Skipped, Split, check_file_size, fail_to_read, printable
from ..splits import UnsplitDataset, quote_names
from .split_names import find_splits

EXTENSIONS = frozenset(readable_formats())
PACKAGES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".jxl": "pillow-jxl-plugin",
    ".avif": "pillow-avif-plugin",
}
"""The packages that read further formats, by suffix."""

HIDDEN = "hidden"
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "lost+found", "__pycache__"))
"""Never classes; hidden folders are ignored as well."""

HASHING_THREADS = 8
"""Hashing waits for the disk as much as for the processor."""

_EMPTY = hashlib.sha256(b"").hexdigest()

Labels = int | tuple[int, ...]
"""The class of an image, or its classes in a multi-label set."""

_Files = dict[Split, list[tuple[Path, int]]]


@dataclass
class FolderScan:
    """A data folder, and the files in it that are skipped or ignored."""

    root: Path
    """Resolved; links that lead out of it are followed only if ``follow_links``."""
    top: Path
    """As specified by the user; names are relative to it."""
    follow_links: bool = False
    skipped: list[Skipped] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of ignored files by suffix, or another description."""
    links: list[str] = field(default_factory=list)
    """Links that are not followed, with their targets."""

    @property
    def notes(self) -> list[str]:
        """What is not used."""
        notes = []
        if self.ignored:
            notes.append(f"ignored files: {describe_ignored(self.ignored)}")
        if self.links:
            notes.append(
                f"{len(self.links)} links that lead out of the data folder are not followed, such as "
                f"{self.links[0]}: use --follow-links to follow them"
            )
        return notes

    def leads_out(self, path: Path) -> bool:
        """Return True, and skip it, if a path is a link that leads out and is not followed."""
        if self.follow_links or path.resolve().is_relative_to(self.root):
            return False
        self.skip(path, "a link that leads out of the data folder")
        self.links.append(f"{self.name(path)} to {printable(os.path.realpath(path))}")
        return True

    def skip(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.skipped.append(Skipped(self.name(path), reason, unreadable))

    def ignore(self, path: Path) -> None:
        kind = printable(path.suffix.lower()) if path.is_file() else "special files"
        self.ignored[kind or "without an extension"] += 1

    def ignore_outside(self, images: Sequence[Path]) -> None:
        if images:
            self.ignored["images outside of the class folders"] += len(images)

    def copy(self) -> "FolderScan":
        """Return a scan that records nothing in this one."""
        return FolderScan(self.root, self.top, self.follow_links)

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.top).as_posix())


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return counts such as ``20 .heic (pip install pillow-heif reads them), 3 .txt``."""
    parts = [
        f"{count:,} {kind}" + (f" (pip install {PACKAGES[kind]} reads them)" if kind in PACKAGES else "")
        for kind, count in sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    ]
    more = [f"{len(parts) - 8} other kinds"] if len(parts) > 8 else []
    return ", ".join([*parts[:8], *more])


def read_folder(
    path: Path,
    *,
    follow_links: bool = False,
    for_training: bool = True,
    progress: Progress | None = None,
) -> UnsplitDataset:
    """Read the images in a folder, with the splits that its folders name.

    ``path`` contains a folder for each class (images in it at any depth), or folders called train, val and
    test (or similar, see ``split_names``) with class folders, or class folders with those folders. Without
    test, val is the test split; see ``UnsplitDataset.split`` for what happens to the splits. Hidden files and
    files other than images are ignored and counted; links that lead out of the folder are skipped unless
    ``follow_links``. Without ``for_training``, the images are only validated on: ``test`` suffices, and
    splits may lack classes.

    Raises:
        UsageError: the folder does not exist, is empty or not of this form, or its classes do not match.
    """
    shown = printable(str(path))
    if not path.is_dir():
        raise UsageError(f"--data {shown} is not a folder.")
    scan = FolderScan(path.resolve(), path, follow_links)
    try:
        classes, files, has_splits = _find_classes(scan, shown, for_training)
    except PermissionError as error:
        raise UsageError(
            f"{printable(str(error.filename))} cannot be read. Check its permissions."
        ) from error
    except UsageError as error:
        raise mention(error, scan.notes) from error
    images = hash_files(files, scan, progress)
    unused = describe_unused_splits(path)
    return UnsplitDataset(
        printable(path.resolve().name),
        shown,
        classes,
        images,
        has_splits,
        scan.skipped,
        scan.ignored,
        notes=[*scan.notes, *([unused] if unused else [])],
    )


def mention(error: UsageError, notes: Iterable[str]) -> UsageError:
    """Return an error about a data set with what was not used of it."""
    return UsageError(" ".join([str(error), *(f"{note[0].upper()}{note[1:]}." for note in notes)]))


def _find_classes(scan: FolderScan, shown: str, for_training: bool) -> tuple[list[str], _Files, bool]:
    """Return the classes, the files of each split, and True if folders assign the splits."""
    folders, loose = _list_folder(scan, scan.top)
    scan.ignore_outside(loose)
    splits = find_splits(folder.name for folder in folders)
    split_folders = {folder: splits[folder.name] for folder in folders if folder.name in splits}
    only_splits = bool(split_folders) and len(split_folders) == len(folders)
    if "train" not in split_folders.values() and (for_training or not only_splits):
        if only_splits:
            names = quote_names([folder.name for folder in split_folders])
            raise UsageError(f"{shown} contains {names} but no 'train' folder. Add one.")
        split_folders = {}  # a class may be called 'test'; without 'train' it is not a split
    others = [folder for folder in folders if folder not in split_folders]
    if others and not any(_list_folder(scan.copy(), folder)[0] for folder in split_folders):
        split_folders = {}  # a class may be called 'train' if it contains images like the other classes
    if split_folders:
        _check_no_split(scan, list(split_folders), others)
        return *_find_split_files(scan, split_folders, for_training), True
    _check_class_folders(shown, folders, loose)
    if inner := _find_inner_splits(scan, shown, folders):
        return *_assign_splits(inner, {split: split for split in inner}, for_training), True
    classes = _class_names(folders)
    files = [(file, label) for label, folder in enumerate(folders) for file in find_images(scan, folder)]
    if not files:
        raise UsageError(f"The folders in {shown} contain no images.")
    return classes, {"train": files}, False


def _check_no_split(scan: FolderScan, split_folders: Sequence[Path], others: Sequence[Path]) -> None:
    """Refuse images in folders next to train, val and test."""
    with_images = [folder.name for folder in others if _has_images(scan, folder)]
    if with_images:
        splits = quote_names([folder.name for folder in split_folders])
        raise UsageError(
            f"{quote_names(with_images)}: images next to {splits} that are no split. Splits are named train, "
            "val and test: rename or remove other folders. If all of them are classes, move them into a new "
            "folder named train."
        )
    for folder in others:
        scan.skip(folder, "it is next to 'train' and contains no images")


def _find_inner_splits(
    scan: FolderScan, shown: str, folders: Sequence[Path]
) -> dict[Split, dict[str, list[Path]]]:
    """Return the images by split and class if class folders contain split folders, else nothing.

    Raises:
        UsageError: all folders contain the same folders, so they may be splits or folds.
    """
    listed = {folder: _list_folder(scan.copy(), folder) for folder in folders if _has_images(scan, folder)}
    if len(listed) < 2 or any(loose or not inner for inner, loose in listed.values()):
        return {}
    contents = {
        folder: [path for path in inner if _has_images(scan, path)] for folder, (inner, _) in listed.items()
    }
    splits = find_splits({path.name for inner in contents.values() for path in inner})
    by_class = [{splits.get(path.name) for path in inner} for inner in contents.values()]
    if all("train" in names and None not in names for names in by_class):
        images: dict[Split, dict[str, list[Path]]] = {split: {} for split in splits.values()}
        for name, inner in zip(_class_names(list(contents)), contents.values(), strict=True):
            for path in inner:
                images[splits[path.name]].setdefault(name, []).extend(find_images(scan, path))
        return images
    common = sorted(set.intersection(*({path.name for path in inner} for inner in contents.values())))
    if len(common) > 1:
        raise UsageError(
            f"{quote_names([folder.name for folder in contents])} in {shown} all contain "
            f"{quote_names(common)}, so they may be splits or folds, and not classes. If they are splits, "
            "name them train, val and test. If they are classes, move them into a new folder named train."
        )
    return {}


def _has_images(scan: FolderScan, folder: Path) -> bool:
    return next(find_images(scan.copy(), folder), None) is not None


def _check_class_folders(shown: str, folders: Sequence[Path], loose: Sequence[Path]) -> None:
    if not folders:
        raise UsageError(
            f"{shown} contains {'images but no' if loose else 'no'} class folders. Put the images of each "
            "class into a folder."
        )
    if len(folders) == 1 and not loose and sum(path.is_dir() for path in folders[0].iterdir()) > 1:
        inner = printable(str(Path(shown) / folders[0].name))
        raise UsageError(f"{shown} contains one folder with further folders. Use --data {inner}.")


def describe_unused_splits(path: Path) -> str | None:
    """Return a warning if the folder is one split of a data set with further splits next to it."""
    path = path.absolute()
    try:
        splits = find_splits(other.name for other in path.parent.iterdir() if other.is_dir())
    except OSError:
        return None
    others = [name for name in splits if name != path.name]
    if path.name not in splits or not others:
        return None
    return (
        f"not used, although next to {printable(path.name)}: {quote_names(others)}; "
        f"use --data {printable(str(path.parent))} for all of them"
    )


def _class_names(folders: Sequence[Path]) -> list[str]:
    names = [unicodedata.normalize("NFC", printable(folder.name)) for folder in folders]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UsageError(f"Two class folders have the same printable name {repeated}. Rename one of them.")
    return names


def _find_split_files(
    scan: FolderScan, split_folders: dict[Path, Split], for_training: bool
) -> tuple[list[str], _Files]:
    images: dict[Split, dict[str, list[Path]]] = {}
    folder_of: dict[Split, str] = {}
    for folder, split in split_folders.items():
        if split in images:
            raise UsageError(
                f"'{folder_of[split]}' and '{folder.name}' are the same split. Keep one of them."
            )
        folder_of[split] = folder.name
        class_folders, loose = _list_folder(scan, folder)
        # The same folder once more, as in some archives.
        while len(class_folders) == 1 and not loose and class_folders[0].name == folder.name:
            class_folders, loose = _list_folder(scan, class_folders[0])
        if not class_folders:
            raise UsageError(
                f"'{folder.name}' contains {'images but ' if loose else ''}no class folders. Put the images "
                "of each class into a folder of its name."
            )
        scan.ignore_outside(loose)
        names = _class_names(class_folders)
        images[split] = {}
        for name, path in zip(names, class_folders, strict=True):
            if paths := list(find_images(scan, path)):
                images[split][name] = paths
            else:
                scan.skip(path, "a class folder without images")
        if not images[split]:
            raise UsageError(f"The class folders in '{folder.name}' contain no images.")
    return _assign_splits(images, folder_of, for_training)


def _assign_splits(
    images: dict[Split, dict[str, list[Path]]], folder_of: dict[Split, str], for_training: bool
) -> tuple[list[str], _Files]:
    """Return the classes, and the files of each split with their labels.

    Raises:
        UsageError: the classes of the splits differ.
    """
    classes = list(dict.fromkeys(name for by_class in images.values() for name in by_class))
    if for_training:
        classes = list(images["train"])
        train = folder_of["train"]
        for split, other in folder_of.items():
            missing = [name for name in classes if name not in images[split]]
            new = [name for name in images[split] if name not in images["train"]]
            if missing or new:
                parts = [f"only '{train}' has images of {quote_names(missing)}"] * bool(missing)
                parts += [f"only '{other}' has images of {quote_names(new)}"] * bool(new)
                raise UsageError(f"The classes of '{train}' and '{other}' differ: {'; '.join(parts)}.")
    return classes, {
        split: [(file, label) for label, name in enumerate(classes) for file in by_class.get(name, ())]
        for split, by_class in images.items()
    }


def _list_folder(scan: FolderScan, folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the class folders (in the order of torchvision's ImageFolder) and the images in a folder."""
    folders, images = [], []
    for path in _list_entries(scan, folder):
        if path.is_dir():
            if path.name not in SYSTEM_FOLDERS:
                folders.append(path)
        elif path.suffix.lower() in EXTENSIONS:
            images.append(path)
        else:
            scan.ignore(path)
    return folders, images


def find_images(scan: FolderScan, folder: Path, parents: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders."""
    resolved = folder.resolve()
    if resolved in parents:
        scan.skip(folder, "a link to a folder that contains it")
        return
    for path in _list_entries(scan, folder):
        if path.is_dir():
            yield from find_images(scan, path, parents | {resolved})
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path
        else:
            scan.ignore(path)


def _list_entries(scan: FolderScan, folder: Path) -> list[Path]:
    """Return a folder's entries by name, without hidden files and links that are broken or lead out."""
    paths = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                scan.ignored[HIDDEN] += 1
            elif entry.is_symlink() and not path.exists():
                scan.skip(path, "a broken link")
            elif not (entry.is_symlink() and scan.leads_out(path)):
                paths.append(path)
    return paths


def hash_files(
    files: Mapping[Split, Sequence[tuple[Path, Labels]]], scan: FolderScan, progress: Progress | None
) -> dict[Split, list[Image]]:
    """Return the images in these files; empty and unreadable files are added to ``scan.skipped``."""
    total, done = sum(map(len, files.values())), 0
    images: dict[Split, list[Image]] = {split: [] for split in files}
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for split, labeled in files.items():
            # In blocks, so that an interrupt waits for few files.
            keys = (
                key
                for start in range(0, len(labeled), 512)
                for key in threads.map(_hash_file, [file for file, _ in labeled[start : start + 512]])
            )
            for (file, labels), key in zip(labeled, keys, strict=True):
                done += 1
                if isinstance(key, OSError):
                    scan.skip(file, f"could not be read: {key.strerror or key}", unreadable=True)
                elif key == _EMPTY:  # all empty files would count as one image with many classes
                    scan.skip(file, "the file is empty", unreadable=True)
                elif isinstance(labels, tuple):
                    images[split].append(Image.with_labels(scan.name(file), labels, key, file))
                else:
                    images[split].append(Image(scan.name(file), labels, key, file))
                if progress:
                    progress(done, total)
    return images


def _hash_file(file: Path) -> str | OSError:
    try:
        with file.open("rb") as stream:
            check_file_size(stream)
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (PermissionError, FileNotFoundError) as error:
        return error
    except OSError as error:
        if error.errno != errno.EFBIG:  # a passing fault would leave the image out
            raise fail_to_read(printable(file.name), error) from error
        return error
