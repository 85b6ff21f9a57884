"""Which files a bench times: those of run folders and artifact folders, and any .onnx file by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...export.runtime import ArtifactError, read_manifest, read_verified
from ...export.int8.targets import TARGETS, timed_here
from ..config_file import read_config
from ..errors import UsageError
from ..onnx_input import OnnxInput, foreign_input, onnx_input
from ..unfinished import refuse_unfinished


@dataclass(frozen=True)
class Found:
    """A file to time. ``key`` is its part in a run; ``name`` is made unique later."""

    path: Path
    name: str
    shown: str
    """As the results call it: never with what lies above the folder that was given."""
    key: str | None
    takes: OnnxInput


@dataclass(frozen=True)
class Files:
    """All that is to be timed, what is left out and why, and the images of the runs' own data."""

    found: list[Found]
    notes: list[str]
    runs: list[Path]
    """The run folders among what was given."""


def find(paths: Sequence[Path], aside: Path, image_size: int | None = None) -> Files:
    """The files that ``paths`` stand for, each with a name of its own.

    Args:
        paths: run folders, artifact folders and .onnx files.
        aside: a folder for the bytes of single .onnx files as they were looked at: these are what is timed.
        image_size: the side of the input where a file leaves it open.

    Raises:
        UsageError: one of them is none of these, or cannot be timed.
    """
    if not paths:
        raise UsageError("Name a run folder, an artifact folder or an .onnx file to time.")
    groups, notes = [], []
    for path in paths:
        if path.is_dir():
            found, left = _of_folder(path, image_size)
            groups.append(found)
            notes += left
        elif path.exists():
            content, takes = foreign_input(path, image_size)
            copy = aside / f"{len(groups)}.onnx"
            copy.write_bytes(content)
            groups.append([Found(copy, path.name.removesuffix(".onnx"), path.name, None, takes)])
        else:
            raise UsageError(f"There is no {path}; name a run folder, an artifact folder or an .onnx file.")
    named = _named(paths, groups)
    if not named:
        raise UsageError(f"Nothing can be timed here: {'; '.join(notes)}.")
    return Files(named, notes, [path for path in paths if (path / "run.json").is_file()])


def _of_folder(path: Path, image_size: int | None) -> tuple[list[Found], list[str]]:
    """A run's teachers first, then the float file, then int8."""
    refuse_unfinished(path)
    try:
        folder, manifest = read_manifest(path)
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error
    found, notes = [], []
    for teacher in timed_teachers(path):
        key = teacher.stem.replace(".", " ")
        shown = teacher.relative_to(path).as_posix()
        found.append(Found(teacher, key, shown, key, onnx_input(teacher, image_size)))
    left = timed_here(TARGETS)
    for entry in sorted(manifest["files"], key=lambda entry: entry["precision"] != "fp32"):
        why = left.get(entry["target"]) if entry["target"] is not None else None
        if why is not None:
            notes.append(f"{entry['name']} is {why}")
            continue
        file = folder / entry["name"]
        _verify(folder, entry)
        shown = file.relative_to(path).as_posix()
        name, part = _role(entry, {one.key for one in found})
        found.append(Found(file, name, shown, part, onnx_input(file, image_size)))
    return found, notes


def _verify(folder: Path, entry: dict[str, Any]) -> None:
    """What lies in a file is what the manifest says; of weights beside it that is not said."""
    try:
        read_verified(folder, entry)
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error


def _role(entry: dict[str, Any], taken: set[str | None]) -> tuple[str, str | None]:
    """Of a shipped file: its name, and its key where it is the first of its precision."""
    precision = str(entry["precision"])
    key = {"fp32": "student", "int8": "student_int8"}.get(precision)
    if key is None or key in taken:
        return " ".join(filter(None, (precision, entry["target"]))), None
    return precision, key


def timed_teachers(run: Path) -> list[Path]:
    """The files of a run's teachers, in their order: ``teacher.onnx``, or ``teacher.0.onnx`` and so on."""
    several = (run / "bench").glob("teacher.*.onnx")
    numbered = [(file.suffixes[0][1:], file) for file in several if file.suffixes[0][1:].isdecimal()]
    alone = run / "bench" / "teacher.onnx"
    return [alone] if alone.is_file() else [file for _, file in sorted(numbered, key=lambda one: int(one[0]))]


def _named(paths: Sequence[Path], groups: Sequence[Sequence[Found]]) -> list[Found]:
    """Names of one group as they are; of several with what they came from; the same ones numbered."""
    several = len(groups) > 1
    of_folders = _distinct([path for path in paths if path.is_dir()])
    of_files = _distinct([path.with_suffix("") for path in paths if not path.is_dir()])
    named: list[Found] = []
    for path, group in zip(paths, groups, strict=True):
        for one in group:
            if path.is_dir():
                name = f"{of_folders[path]} {one.name}" if several else one.name
                key, shown = (None if several else one.key), f"{of_folders[path]}/{one.shown}"
                named.append(replace(one, name=name, key=key, shown=shown if several else one.shown))
            else:
                named.append(replace(one, name=of_files[path.with_suffix("")]))
    counts: dict[str, int] = {}
    unique = []
    for one in named:
        counts[one.name] = counts.get(one.name, 0) + 1
        again = counts[one.name]
        unique.append(one if again == 1 else replace(one, name=f"{one.name} ({again})"))
    return unique


def _distinct(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of paths that tell different ones apart."""
    whole = {path: path.resolve().parts for path in paths}
    for length in range(1, max((len(parts) for parts in whole.values()), default=1) + 1):
        ends = {path: "/".join(parts[-length:]) for path, parts in whole.items()}
        if len(set(ends.values())) == len(set(whole.values())):
            return ends
    return {path: path.name for path in paths}


def images_of_run(run: Path) -> Path | None:
    """The folder of images that a run was made from, where it still is one."""
    try:
        data = Path(str(read_config(run)["data"])).expanduser()
    except (UsageError, KeyError):
        return None  # of a run that is older or was cut short: there are other pictures
    return data if data.is_dir() else None
