"""A data set that is a folder of class folders, with or without train, val and test folders above them."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UsageError
from ..dataset import ImageSet, Progress, Split, Walk, hashed, printable
from ..splits import UnsplitDataset, listed

# Those of torchvision's ImageFolder, and GIF.
EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "gif"),
    )
)
ROLE_FOLDERS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Folders that systems leave behind; hidden ones are passed over anyway.
NOT_CLASSES = frozenset(("__MACOSX", "@eaDir", "lost+found", "__pycache__"))


def open_folder(
    path: Path, *, val_fraction: float | None = None, progress: Progress | None = None
) -> ImageSet:
    """The image set in a folder.

    ``path`` holds a folder for each class (images in it at any depth), or folders called train, val and test
    (or ``training``, ``valid``, ``validation``, ``testing``) that do. Without test, val is the test role; see
    ``split.assemble`` for what happens to the roles. Hidden files and what is no image are passed over and
    counted; links that lead out of the folder are not followed and reported as skipped.

    Raises:
        UsageError: the folder is missing, a file, empty, or not of this form, or its classes don't fit.
    """
    return read_folder(path, progress=progress).assembled(val_fraction)


def read_folder(path: Path, *, to_learn: bool = True, progress: Progress | None = None) -> UnsplitDataset:
    """The images in a folder, with the roles that its folders name.

    ``to_learn``: train is needed where there are roles, and each role needs every class. Without it the
    images are for validation alone: ``test`` may stand by itself, and a role has the classes that it has.

    Raises:
        UsageError: as ``open_folder``.
    """
    shown = printable(str(path))
    if not path.exists():
        raise UsageError(f"There is no data folder {shown}; check the path given as --data.")
    if not path.is_dir():
        raise UsageError(
            f"{shown} is a file; --data takes a folder that holds a folder of images for each class."
        )
    walk = Walk(path.resolve(), path)
    try:
        classes, files, roles = _classes_and_files(walk, shown, to_learn)
    except PermissionError as error:
        raise UsageError(
            f"{printable(str(error.filename))} may not be read; check its permissions."
        ) from error
    return UnsplitDataset(
        printable(path.resolve().name),
        shown,
        tuple(classes),
        hashed(files, walk, progress),
        has_roles=roles,
        skipped=tuple(walk.skipped),
        ignored=walk.ignored,
    )


_Files = dict[Split, list[tuple[Path, int]]]


def _classes_and_files(walk: Walk, shown: str, to_learn: bool) -> tuple[list[str], _Files, bool]:
    """The classes, the files of each role, and whether folders have given the roles."""
    folders, loose = _inside(walk, walk.top)
    roles = {folder: ROLE_FOLDERS.get(folder.name.lower()) for folder in folders}
    role_folders = {folder: role for folder, role in roles.items() if role}
    all_roles = bool(role_folders) and len(role_folders) == len(folders)
    if "train" not in role_folders.values() and (to_learn or not all_roles):
        if all_roles:
            names = listed([folder.name for folder in role_folders])
            raise UsageError(
                f"{shown} has {names} but no 'train' folder; add one, or give the class folders alone."
            )
        role_folders = {}  # a class may be called 'test'; without 'train' beside it, it is no role
    if not role_folders:
        _expect_folders(walk, shown, folders, loose)
        return *_whole(walk, folders), False
    walk.ignored += len(loose)
    for folder in folders:
        if folder not in role_folders:
            walk.skip(folder, "stands beside 'train' but is neither val nor test")
    return *_by_role(walk, role_folders, to_learn), True


def _expect_folders(walk: Walk, shown: str, folders: Sequence[Path], loose: Sequence[Path]) -> None:
    if loose and not folders:
        raise UsageError(
            f"{shown} holds images but no class folders; put the images of each class into a folder."
        )
    if not folders:
        links = f" ({len(walk.skipped)} links that lead out of it are not followed)" if walk.skipped else ""
        raise UsageError(
            f"{shown} holds no class folders{links}; put the images of each class into a folder."
        )
    if len(folders) == 1 and not loose and len(_inside(walk, folders[0])[0]) > 1:
        inner = printable(str(Path(shown) / folders[0].name))
        raise UsageError(f"{shown} holds one folder, and that holds the others: name it, --data {inner}.")
    walk.ignored += len(loose)


def one_role_alone(path: Path) -> str | None:
    """A sentence where the folder is one role of a data set, whose other roles lie beside it."""
    path = path.absolute()
    if path.name.lower() not in ROLE_FOLDERS or not path.is_dir():
        return None
    beside = [name for name in ROLE_FOLDERS if name != path.name.lower() and (path.parent / name).is_dir()]
    if not beside:
        return None
    return (
        f"{listed(beside)} beside {printable(path.name)} {'is' if len(beside) == 1 else 'are'} not used: "
        f"--data {printable(str(path.parent))} takes them all"
    )


def _whole(walk: Walk, folders: Sequence[Path]) -> tuple[list[str], _Files]:
    names = _names(folders)
    found = [(file, label) for label, folder in enumerate(folders) for file in _images(walk, folder)]
    if not found:
        raise UsageError(f"The folders in {printable(str(walk.top))} hold no images.")
    return names, {"train": found}


def _names(folders: Sequence[Path]) -> list[str]:
    """The classes' names: the folders', as they can be printed."""
    names = [printable(folder.name) for folder in folders]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"Two class folders are called {twice} where they are printed; rename one.")
    return names


def _by_role(walk: Walk, role_folders: dict[Path, Split], to_learn: bool) -> tuple[list[str], _Files]:
    by_name: dict[Split, dict[str, list[Path]]] = {}
    folder_of: dict[Split, str] = {}
    for top, role in role_folders.items():
        if role in by_name:
            raise UsageError(
                f"'{folder_of[role]}' and '{top.name}' mean the same; keep one of the two folders."
            )
        folder_of[role] = top.name
        class_folders, loose = _inside(walk, top)
        if not class_folders:
            raise UsageError(
                f"'{top.name}' holds {'images but ' if loose else ''}no class folders; "
                "put the images of each class into a folder of its name."
            )
        walk.ignored += len(loose)
        names = _names(class_folders)
        files = {name: list(_images(walk, folder)) for name, folder in zip(names, class_folders, strict=True)}
        by_name[role] = {name: found for name, found in files.items() if found}
        if not by_name[role]:
            raise UsageError(f"The class folders in '{top.name}' hold no images.")
    if "test" not in by_name and "val" in by_name:
        by_name["test"], folder_of["test"] = by_name.pop("val"), folder_of.pop("val")
    classes = list(dict.fromkeys(name for role in by_name.values() for name in role))
    if to_learn:
        classes = list(by_name["train"])
        for role in by_name:
            _same_classes(folder_of["train"], classes, folder_of[role], list(by_name[role]))
    return classes, {
        role: [(file, label) for label, name in enumerate(classes) for file in by_name[role].get(name, ())]
        for role in by_name
    }


def _same_classes(train: str, classes: list[str], other: str, others: list[str]) -> None:
    missing = [name for name in classes if name not in others]
    new = [name for name in others if name not in classes]
    if missing or new:
        parts = [f"only '{train}' has images of {listed(missing)}"] * bool(missing)
        parts += [f"only '{other}' has images of {listed(new)}"] * bool(new)
        raise UsageError(f"The classes of '{train}' and '{other}' differ: {'; '.join(parts)}.")


def _inside(walk: Walk, folder: Path) -> tuple[list[Path], list[Path]]:
    """The class folders (sorted as torchvision's ImageFolder sorts them) and loose images in a folder."""
    folders, images = [], []
    for path in _entries(walk, folder):
        if path.is_dir():
            if path.name not in NOT_CLASSES:
                folders.append(path)
        elif path.suffix.lower() in EXTENSIONS:
            images.append(path)
        else:
            walk.ignored += 1
    return folders, images


def _images(walk: Walk, folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every image in a folder and the folders within it."""
    here = folder.resolve()
    if here in above:
        walk.skip(folder, "a link to a folder that it lies in")
        return
    for path in _entries(walk, folder):
        if path.is_dir():
            yield from _images(walk, path, above | {here})
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            yield path
        else:
            walk.ignored += 1


def _entries(walk: Walk, folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden files and links that lead out or nowhere."""
    entries = []
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                walk.ignored += 1
            elif entry.is_symlink() and not path.exists():
                walk.skip(path, "a link that leads nowhere")
            elif entry.is_symlink() and not path.resolve().is_relative_to(walk.root):
                walk.skip(path, "a link that leads out of the data folder")
            else:
                entries.append(path)
    return entries
