"""Which runs are compared: run folders, folders of them, and reports."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UsageError
from ..runs.folder import RunFolder
from ..runs.results import Report
from ..sealed import read_sealed

RUN, REPORT, RESOLUTIONS = "run.json", "report.json", "resolutions.json"


@dataclass(frozen=True)
class Run:
    """``name`` tells it from the others; ``folder`` is None where only its report was named."""

    name: str
    source: Path
    folder: Path | None
    report: Report


def runs(paths: Sequence[Path]) -> list[Run]:
    """Every run once, in the order named; those of a folder of runs by name.

    Raises:
        UsageError: one is no run, nor a folder of runs, nor a report.
    """
    found = {place.resolve(): place for path in paths for place in _places(path)}
    places = list(found.values())
    return [
        Run(name, place, _folder(place), _report(place))
        for name, place in zip(_names(list(found)), places, strict=True)
    ]


def _places(path: Path) -> Iterator[Path]:
    """A run's folder or report, or those in a folder."""
    if path.is_file():
        yield path.parent if path.name == REPORT and (path.parent / RUN).is_file() else path
    elif _is_run(path):
        yield path
    elif (path / RESOLUTIONS).is_file():
        yield from _sizes(path)
    elif path.is_dir():
        inside = [one for one in sorted(path.iterdir()) if one.is_dir()]
        children = [one for one in inside if _is_run(one) or (one / RESOLUTIONS).is_file()]
        if not children:
            raise UsageError(
                f"{path} holds no run, nor does a folder in it: name run folders that compress has made, a "
                "folder of them, or their report.json."
            )
        for child in children:
            yield from _places(child)
    else:
        raise UsageError(f"{path} does not exist: name run folders that compress has made.")


def _is_run(path: Path) -> bool:
    return (path / RUN).is_file() or (path / REPORT).is_file()


def _sizes(path: Path) -> Iterator[Path]:
    """The students of `compress resolutions`; its teacher's own run has none."""
    file = path / RESOLUTIONS
    try:
        for one in read_sealed(file)["sizes"]:
            child = path / one["folder"]
            if not child.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{one['folder']!r} is not in this folder")
            if _is_run(child):
                yield child
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error


def _folder(place: Path) -> Path | None:
    if place.is_dir():
        return place
    return None


def _report(place: Path) -> Report:
    file = place / REPORT if place.is_dir() else place
    if not file.is_file():  # stopped before its first stage was done
        from ..stages.report import assemble

        record = RunFolder(place, writes=False)
        record.open(fresh=False)
        if not (place / "config.yaml").is_file():
            raise UsageError(f"{place} holds a run without its config.yaml; it cannot be read.")
        return assemble(record)
    try:
        return _read(read_sealed(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        raise UsageError(
            f"{file} is no report of this version of questpress; the command that made the run writes it "
            "anew."
        ) from error
    except ValueError as error:  # not UTF-8, not JSON, or not as it was written
        if file.suffix != Path(REPORT).suffix:
            raise UsageError(
                f"{file} is neither a run folder nor a report.json: name run folders that compress has made, "
                "a folder of them, or their report.json."
            ) from error
        raise UsageError(
            f"{file} is no report, or damaged ({error}): compress report writes it anew."
        ) from error


def _read(content: Any) -> Report:
    """A report, without what only other versions of questpress know.

    Raises:
        ValueError: it is none.
    """
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        unknown = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
        if len(unknown) < error.error_count():
            raise
    for loc in unknown:
        place = content
        for part in loc[:-1]:
            place = place[part]
        del place[loc[-1]]
    return Report.model_validate(content)


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other has."""
    parts = [(one.parent if one.name == REPORT else one).parts for one in places]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names
