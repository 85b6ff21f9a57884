"""Which files a bench times: those of run folders and artifact folders, and any .onnx file by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...export.conversion.untrusted import read_foreign
from ...export.errors import ExportError
from ...export.int8.targets import TARGETS, explain_untimed
from ...export.runtime import MAX_SIDE, METADATA_PREFIX, ArtifactError, read_manifest, read_verified
from ..errors import UsageError
from .folder import check_finished, read_config

_KINDS: dict[int, np.dtype] = {
    int(onnx.TensorProto.FLOAT): np.dtype(np.float32),
    int(onnx.TensorProto.UINT8): np.dtype(np.uint8),
}


@dataclass(frozen=True)
class OnnxInput:
    """The one input of a network for images: ``shape`` is that of one image, [3, H, W] or [H, W, 3]."""

    shape: tuple[int, int, int]
    kind: np.dtype
    any_batch: bool
    """Whether it takes batches of any size, and not single images alone."""
    any_size: bool
    """Whether the file leaves the size of its images open."""
    ours: bool
    """Whether the file carries questpress's preprocessing and labels."""
    bytes: int
    """Of the file and of the weights that lie beside it."""

    @property
    def description(self) -> str:
        """Type and shape, such as ``float32 [1, 3, 224, 224]``."""
        return f"{self.kind} [1, {', '.join(map(str, self.shape))}]"


def onnx_input(path: Path, image_size: int | None = None) -> OnnxInput:
    """Of a file of a run, whose weights may lie in the one file beside it that is named after it.

    Raises:
        UsageError: it is no ONNX file or one that is not to be trusted, or takes something other than single
            images.
    """
    return _read(path, image_size, beside=True)[1]


def foreign_input(path: Path, image_size: int | None = None) -> tuple[bytes, OnnxInput]:
    """Of a file that somebody else may have made, and its bytes: what was looked at is what is to be run.

    Raises:
        UsageError: as for ``onnx_input``; such a file keeps all of its weights in itself.
    """
    return _read(path, image_size, beside=False)


def _read(path: Path, image_size: int | None, *, beside: bool) -> tuple[bytes, OnnxInput]:
    try:
        content, model = read_foreign(path, beside=beside)
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    return content, _taken(path, model, image_size)


def _taken(path: Path, model: onnx.ModelProto, image_size: int | None) -> OnnxInput:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    if len(inputs) != 1:
        named = ", ".join(one.name for one in inputs) or "none"
        raise UsageError(
            f"{path} has not one input but {len(inputs)} ({named}); only single images can be timed."
        )
    kind, shape, any_batch, any_size = _shape(path, inputs[0], image_size)
    data = path.with_name(f"{path.name}.data")
    outside = any(one.data_location == onnx.TensorProto.EXTERNAL for one in graph.initializer)
    return OnnxInput(
        shape=shape,
        kind=kind,
        any_batch=any_batch,
        any_size=any_size,
        ours=any(one.key == f"{METADATA_PREFIX}version" for one in model.metadata_props),
        bytes=path.stat().st_size + (data.stat().st_size if outside else 0),
    )


def _shape(
    path: Path, given: onnx.ValueInfoProto, image_size: int | None
) -> tuple[np.dtype, tuple[int, int, int], bool, bool]:
    tensor = given.type.tensor_type
    kind = _KINDS.get(int(tensor.elem_type))
    sides = [one.dim_value if one.HasField("dim_value") else None for one in tensor.shape.dim]
    if kind is None or len(sides) != 4:
        known = tensor.elem_type in onnx.TensorProto.DataType.values()
        name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else "no known type"
        shown = ", ".join("?" if one is None else str(one) for one in sides)
        raise UsageError(
            f"{path} takes {name} [{shown}]; an image is float [1, 3, H, W] or uint8 [1, H, W, 3]."
        )
    batch, *rest = sides
    if batch not in (None, 0, 1):
        raise UsageError(
            f"{path} takes {batch} images at once and no single one; export it with a batch of 1."
        )
    channels = 2 if kind == np.uint8 and rest[0] not in (1, 3) else 0
    rest[channels] = rest[channels] or 3
    any_size = None in rest or 0 in rest
    if any_size:
        if image_size is None:
            raise UsageError(f"{path} leaves the size of its images open; name one with --image-size.")
        rest = [one or image_size for one in rest]
    first, second, third = (int(one or 0) for one in rest)
    if max(first, second, third) > MAX_SIDE:
        raise UsageError(
            f"{path} takes images of [{first}, {second}, {third}], and a side has at most {MAX_SIDE:,} "
            "pixels."
        )
    return kind, (first, second, third), batch in (None, 0), any_size


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
    check_finished(path)
    try:
        folder, manifest = read_manifest(path)
    except ArtifactError as error:
        raise UsageError(f"{error}.") from error
    found, notes = [], []
    for teacher in timed_teachers(path):
        key = teacher.stem.replace(".", " ")
        shown = teacher.relative_to(path).as_posix()
        found.append(Found(teacher, key, shown, key, onnx_input(teacher, image_size)))
    left = explain_untimed(TARGETS)
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
