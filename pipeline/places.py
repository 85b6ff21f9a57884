"""Where a command may write: not among the folders that it reads as classes."""

from collections.abc import Mapping
from pathlib import Path

from ..export.text import spelled_out
from .errors import UsageError


def refuse_inside_data(data: str | Path, written: Mapping[str, Path | None]) -> None:
    """
    Args:
        data: what ``--data`` names.
        written: the folders to write to, by their options.

    Raises:
        UsageError: one of them lies in the data folder, where the next command would take it for a class.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for option, place in written.items():
        if place is None or not place.expanduser().resolve().is_relative_to(inside):
            continue
        below = place.expanduser().resolve().relative_to(inside)
        if not any(part.startswith(".") for part in below.parts):  # hidden folders are passed over
            raise UsageError(
                f"{option} {spelled_out(str(place))} lies in the data folder {spelled_out(str(data))}, "
                f"where it would be taken for a class; name a folder elsewhere with {option}."
            )
