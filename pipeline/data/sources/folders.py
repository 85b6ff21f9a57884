"""Folders of class folders, optionally inside train, val and test folders; image files hashed by content."""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UsageError
from ..dataset import Image, Progress, Skipped, Split, check_file_size, fail_to_read, printable
from ..splits import UnsplitDataset, quote_names

_JPEG, _PNM = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pbm", ".pnm")
EXTENSIONS = frozenset((*_JPEG, *_PNM, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
SPLIT_FOLDERS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
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
    """Resolved; links that lead out of it are not followed."""
    top: Path
    """As specified by the user; names are relative to it."""
    skipped: list[Skipped] = field(default_factory=list)
    ignored: int = 0

    def skip(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.skipped.append(Skipped(self.name(path), reason, unreadable))

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.top).as_posix())


def read_folder(path: Path, *, for_training: bool = True, progress: Progress | None = None) -> UnsplitDataset:
    """Read the images in a folder, with the splits that its folders name.

    ``path`` contains a folder for each class (images in it at any depth), or folders called train, val and
    test (or ``training``, ``valid``, ``validation``, ``testing``) with class folders. Without test, val is
    the test split; see ``UnsplitDataset.split`` for what happens to the splits. Hidden files and files other
    than images are ignored and counted; links that lead out of the folder are skipped. Without
    ``for_training``, the images are only validated on: ``test`` suffices, and splits may lack classes.

    Raises:
        UsageError: the folder does not exist, is empty or not of this form, or its classes do not match.
    """
    shown = printable(str(path))
    if not path.is_dir():
        raise UsageError(f"--data {shown} is not a folder.")
    scan = FolderScan(path.resolve(), path)
    try:
        classes, files, has_splits = _find_classes(scan, shown, for_training)
    except PermissionError as error:
        raise UsageError(
            f"{printable(str(error.filename))} cannot be read. Check its permissions."
        ) from error
    images = hash_files(files, scan, progress)
    return UnsplitDataset(
        printable(path.resolve().name), shown, classes, images, has_splits, scan.skipped, scan.ignored
    )


def _find_classes(scan: FolderScan, shown: str, for_training: bool) -> tuple[list[str], _Files, bool]:
    """Return the classes, the files of each split, and True if folders assign the splits."""
    folders, loose = _list_folder(scan, scan.top)
    split_folders = {folder: split for folder in folders if (split := SPLIT_FOLDERS.get(folder.name.lower()))}
    only_splits = bool(split_folders) and len(split_folders) == len(folders)
    if "train" not in split_folders.values() and (for_training or not only_splits):
        if only_splits:
            names = quote_names([folder.name for folder in split_folders])
            raise UsageError(f"{shown} contains {names} but no 'train' folder. Add one.")
        split_folders = {}  # a class may be called 'test'; without 'train' it is not a split
    if split_folders:
        scan.ignored += len(loose)
        for folder in folders:
            if folder not in split_folders:
                scan.skip(folder, "it is next to 'train', but neither val nor test")
        return *_find_split_files(scan, split_folders, for_training), True
    _check_class_folders(scan, shown, folders, loose)
    scan.ignored += len(loose)
    classes = _class_names(folders)
    files = [(file, label) for label, folder in enumerate(folders) for file in _find_images(scan, folder)]
    if not files:
        raise UsageError(f"The folders in {shown} contain no images.")
    return classes, {"train": files}, False


def _check_class_folders(
    scan: FolderScan, shown: str, folders: Sequence[Path], loose: Sequence[Path]
) -> None:
    if not folders:
        contains = "images but no" if loose else "no"
        links = f" ({len(scan.skipped)} links that lead out of it are not followed)" if scan.skipped else ""
        raise UsageError(
            f"{shown} contains {contains} class folders{links}. Put the images of each class into a folder."
        )
    if len(folders) == 1 and not loose and len(_list_folder(scan, folders[0])[0]) > 1:
        inner = printable(str(Path(shown) / folders[0].name))
        raise UsageError(f"{shown} contains one folder with further folders. Use --data {inner}.")


def describe_unused_splits(path: Path) -> str | None:
    """Return a warning if the folder is one split of a data set with further splits next to it."""
    path = path.absolute()
    others = [name for name in SPLIT_FOLDERS if name != path.name.lower() and (path.parent / name).is_dir()]
    if path.name.lower() not in SPLIT_FOLDERS or not path.is_dir() or not others:
        return None
    return (
        f"not used, although next to {printable(path.name)}: {quote_names(others)}; "
        f"use --data {printable(str(path.parent))} for all of them"
    )


def _class_names(folders: Sequence[Path]) -> list[str]:
    names = [printable(folder.name) for folder in folders]
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
        if not class_folders:
            raise UsageError(
                f"'{folder.name}' contains {'images but ' if loose else ''}no class folders. Put the images "
                "of each class into a folder of its name."
            )
        scan.ignored += len(loose)
        names = _class_names(class_folders)
        files = [list(_find_images(scan, path)) for path in class_folders]
        images[split] = {name: paths for name, paths in zip(names, files, strict=True) if paths}
        if not images[split]:
            raise UsageError(f"The class folders in '{folder.name}' contain no images.")
    if "test" not in images and "val" in images:
        images["test"], folder_of["test"] = images.pop("val"), folder_of.pop("val")
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
            scan.ignored += 1
    return folders, images


def _find_images(scan: FolderScan, folder: Path, parents: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders."""
    resolved = folder.resolve()
    if resolved in parents:
        scan.skip(folder, "a link to a folder that contains it")
        return
    for path in _list_entries(scan, folder):
        if path.is_dir():
            yield from _find_images(scan, path, parents | {resolved})
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path
        else:
            scan.ignored += 1


def _list_entries(scan: FolderScan, folder: Path) -> list[Path]:
    """Return a folder's entries by name, without hidden files and links that are broken or lead out."""
    paths = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                scan.ignored += 1
            elif entry.is_symlink() and not path.exists():
                scan.skip(path, "a broken link")
            elif entry.is_symlink() and not path.resolve().is_relative_to(scan.root):
                scan.skip(path, "a link that leads out of the data folder")
            else:
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
