"""``--data``: the built-in digits, a folder, a labels file, or a data set by timm's name."""

from difflib import get_close_matches
from pathlib import Path

from ..errors import UsageError
from .digits import open_digits
from .folders import open_folder
from .image_set import ImageSet, Progress, printable
from .label_files import SUFFIXES, is_label_file, label_files_in, open_label_file

DIGITS = "digits"


def open_data(
    data: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    select_fraction: float | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The image set that ``--data`` names, with its roles.

    Raises:
        UsageError: there is none of this name, or it is not usable; one sentence says why and what to do.
    """
    path = Path(data).expanduser()
    if data == DIGITS:
        return open_digits(select_fraction=select_fraction)
    if path.is_file():
        if not is_label_file(path):
            raise UsageError(
                f"{printable(str(path))} is a file; --data takes a folder that holds a folder of images for "
                f"each class, or a labels file ({', '.join(SUFFIXES)})."
            )
        return open_label_file(path, data_dir=data_dir, select_fraction=select_fraction, progress=progress)
    if path.exists():
        try:
            return open_folder(path, select_fraction=select_fraction, progress=progress)
        except UsageError as error:
            found = label_files_in(path)
            if not found:
                raise
            raise UsageError(f"{error} If {' or '.join(found)} has the labels, name it as --data.") from error

    from .named import PREFIXES, open_named

    if "/" in data and data.partition("/")[0].lower() in PREFIXES:
        return open_named(
            data, data_dir=data_dir, download=download, select_fraction=select_fraction, progress=progress
        )
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


def _beside(path: Path) -> list[Path]:
    try:
        return sorted(one for one in path.parent.iterdir() if one.is_dir())
    except OSError:
        return []
