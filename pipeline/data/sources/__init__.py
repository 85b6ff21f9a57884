"""``--data``: the built-in digits, a folder, a labels file, or a data set by timm's name."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from ...errors import UsageError
from ..dataset import ImageSet, Progress, printable
from ..splits import UnsplitDataset
from .folders import read_folder
from .label_files import SUFFIXES, is_label_file, label_files_in, read_label_file
from .timm_datasets import read_digits

DIGITS = "digits"


def open_data(
    data: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    val_fraction: float | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The image set that ``--data`` names, with its roles.

    Raises:
        UsageError: there is none of this name, or it is not usable; one sentence says why and what to do.
    """
    given = read_data(data, data_dir=data_dir, download=download, progress=progress)
    with _pointing_at_labels(Path(data).expanduser()):
        return given.assembled(val_fraction)


def read_data(
    data: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    to_learn: bool = True,
    progress: Progress | None = None,
) -> UnsplitDataset:
    """The images that ``--data`` names, as they were given.

    Without ``to_learn`` they are for validation alone: a class, or a role, may be missing.

    Raises:
        UsageError: as ``open_data``.
    """
    path = Path(data).expanduser()
    if data == DIGITS:
        _refuse_unused("the built-in digits", data_dir, download)
        return read_digits()
    if path.is_file():
        if not is_label_file(path):
            raise UsageError(
                f"{printable(str(path))} is a file; --data takes a folder that holds a folder of images for "
                f"each class, or a labels file ({', '.join(SUFFIXES)})."
            )
        _refuse_unused("a labels file", None, download)
        return read_label_file(path, data_dir=data_dir, to_learn=to_learn, progress=progress)
    if path.exists():
        _refuse_unused("a folder", data_dir, download)
        with _pointing_at_labels(path):
            return read_folder(path, to_learn=to_learn, progress=progress)

    from .timm_datasets import PREFIXES, read_named

    if "/" in data and data.partition("/")[0].lower() in PREFIXES:
        return read_named(data, data_dir=data_dir, download=download, progress=progress)
    kinds = ", ".join(f"{prefix}/…" for prefix in PREFIXES)
    near = get_close_matches(data.lower(), [DIGITS], cutoff=0.7)
    near += [
        folder.name for folder in _beside(path) if get_close_matches(path.name, [folder.name], cutoff=0.7)
    ]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    raise UsageError(
        f"There is no data folder {data}; --data takes a folder of class folders, a labels file, "
        f"'{DIGITS}', or a name of timm's ({kinds}).{hint}"
    )


def _refuse_unused(what: str, data_dir: Path | None, download: bool) -> None:
    """
    Raises:
        UsageError: an option is given that belongs to data of another kind.
    """
    for option, given in (("--data-dir", data_dir is not None), ("--download", download)):
        if given:
            raise UsageError(f"{option} is of no use where --data is {what}; leave it out.")


@contextmanager
def _pointing_at_labels(path: Path) -> Iterator[None]:
    """What is wrong with a folder of images, with the labels files that it holds."""
    try:
        yield
    except UsageError as error:
        found = label_files_in(path) if path.is_dir() else []
        if not found:
            raise
        raise UsageError(f"{error} If {' or '.join(found)} has the labels, name it as --data.") from error


def _beside(path: Path) -> list[Path]:
    try:
        return sorted(one for one in path.parent.iterdir() if one.is_dir())
    except OSError:
        return []
