"""Read the model files and predictions of run folders, artifact folders, and single .onnx files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ...export.conversion.untrusted import parse_untrusted, read_untrusted
from ...export.errors import ExportError
from ...export.int8.targets import TARGETS, explain_untimed
from ...export.runtime import (
    MAX_SIDE,
    METADATA_PREFIX,
    ORT_SUFFIX,
    ArtifactError,
    Size,
    height_width,
    read_manifest,
    read_verified,
)
from ..errors import UsageError
from .files import atomic_write, data_path, shorten_paths
from .folder import REGENERATE, check_finished, read_config
from .record import RECORD

REPORT_KEYS = {"fp32": "student", "int8": "student_int8"}
"""Names in the report of the first file of each precision."""

DTYPES: dict[int, np.dtype] = {
    int(onnx.TensorProto.FLOAT): np.dtype(np.float32),
    int(onnx.TensorProto.UINT8): np.dtype(np.uint8),
}

PREDICTIONS_FILE = "test_predictions.safetensors"
"""Of the exported files."""
VAL_PREDICTIONS_FILE = "val_predictions.safetensors"
"""Of the trained student, in PyTorch."""
TRAIN_IMAGES_FILE = "train_images.safetensors"


@dataclass(frozen=True)
class ModelFile:
    """A verified file of an artifact, or a single .onnx file."""

    path: Path
    source: Path
    """The run folder, artifact folder or file as given."""
    name: str
    content: bytes
    """The bytes that were verified; these are to be run, since the file may change."""
    manifest: Mapping[str, Any] | None = None
    """None for a single file."""
    precision: str | None = None
    target: str | None = None

    @property
    def run(self) -> Path | None:
        """The run folder of the artifact."""
        folder = self.path.resolve().parent.parent
        return folder if (folder / RECORD).is_file() else None


def open_files(path: Path, file: str | None = None) -> list[ModelFile]:
    """Read and verify the files of a run folder or artifact folder, or a single .onnx file.

    Files in ONNX Runtime's own format are left out; they were compared with their .onnx files at export.

    Raises:
        UsageError: the path is neither, a file is damaged, or is not a safe ONNX file.
    """
    try:
        if not path.is_dir():
            if not path.exists():
                raise UsageError(
                    f"{path} does not exist. Set it to a run folder, artifact folder or .onnx file."
                )
            if file is not None:
                raise UsageError(f"--file {file} requires a run folder or an artifact folder, got {path}.")
            content, _ = read_untrusted(path)
            return [ModelFile(path, path, path.stem, content)]
        check_finished(path)
        folder, manifest = read_manifest(path)
        onnx_files = [entry for entry in manifest["files"] if not entry["name"].endswith(ORT_SUFFIX)]
        entries = [entry for entry in onnx_files if file in (None, entry["name"])]
        if not entries:
            names = ", ".join(str(entry["name"]) for entry in onnx_files)
            raise UsageError(f"--file {file} is not in {folder}. Available: {names}.")
        precisions = Counter(entry["precision"] for entry in onnx_files)
        files = []
        for entry in entries:
            content = read_verified(folder, entry)
            parse_untrusted(content, str(folder / entry["name"]))
            precision, target = str(entry["precision"]), entry.get("target")
            name = precision if precisions[precision] == 1 or target is None else f"{precision} {target}"
            files.append(ModelFile(folder / entry["name"], path, name, content, manifest, precision, target))
        return files
    except (ArtifactError, ExportError) as error:
        raise UsageError(f"{error}.") from error


def name_files(names: Iterable[tuple[Path, str]]) -> list[str]:
    """Return unique names for files, given as (source, name).

    If there are several sources, the shortest unique end of a folder's path is added to the names of its
    files, and a single file is named by it. Repeated names are numbered.
    """
    pairs = list(names)
    sources = list(dict.fromkeys(source for source, _ in pairs))
    folders = [source for source in sources if source.is_dir()]
    files = [source for source in sources if not source.is_dir()]
    short = dict(zip(folders, shorten_paths(folders), strict=True))
    short |= dict(zip(files, shorten_paths([file.with_suffix("") for file in files]), strict=True))
    unique: list[str] = []
    counts: Counter[str] = Counter()
    for source, name in pairs:
        if source in files:
            name = short[source]
        elif len(sources) > 1:
            name = f"{short[source]} {name}"
        counts[name] += 1
        unique.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return unique


def find_teacher_files(run: Path) -> list[Path]:
    """Return the exported teachers in their order: ``teacher.onnx``, or ``teacher.0.onnx`` and so on."""
    single = run / "bench" / "teacher.onnx"
    if single.is_file():
        return [single]
    numbers = {file: file.suffixes[0][1:] for file in (run / "bench").glob("teacher.*.onnx")}
    numbered = [file for file, number in numbers.items() if number.isdecimal()]
    return sorted(numbered, key=lambda file: int(numbers[file]))


def find_run_images(run: Path) -> Path | None:
    """Return the folder of a run's images, or None if it is not a folder or no longer exists."""
    try:
        data = data_path(str(read_config(run)["data"]))
    except (UsageError, KeyError):
        return None
    return data if data is not None and data.is_dir() else None


@dataclass(frozen=True)
class OnnxInput:
    """The input of an image model."""

    shape: tuple[int, ...]
    """Of one image: [3, H, W] or [H, W, 3]."""
    kind: np.dtype
    any_batch: bool
    """False if the model takes single images only."""
    any_size: bool
    """True if the image size is dynamic."""
    has_metadata: bool
    """True if the file contains questpress's preprocessing and labels."""
    bytes: int
    """Size of the file, with external weights."""

    def __str__(self) -> str:
        return f"{self.kind} [1, {', '.join(map(str, self.shape))}]"


def read_input(
    path: Path, image_size: Size | None = None, *, external_data: bool = True, source: Path | None = None
) -> OnnxInput:
    """Return the input of an ONNX file.

    Args:
        image_size: that of the input if it is dynamic.
        external_data: True if weights may be in the file ``NAME.onnx.data`` next to it.
        source: the file to name in errors if ``path`` is a copy of it.

    Raises:
        UsageError: it is not a safe ONNX file, or does not take single images.
    """
    try:
        _, model = read_untrusted(path, external_data=external_data)
    except ExportError as error:
        raise UsageError(f"{error}.") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UsageError(f"{source or path} must have one input, got {len(inputs)} ({names}).")
    kind, shape, any_batch, any_size = _read_shape(source or path, inputs[0], image_size)
    data = path.with_name(f"{path.name}.data")
    is_external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    return OnnxInput(
        shape=shape,
        kind=kind,
        any_batch=any_batch,
        any_size=any_size,
        has_metadata=any(entry.key == f"{METADATA_PREFIX}version" for entry in model.metadata_props),
        bytes=path.stat().st_size + (data.stat().st_size if is_external else 0),
    )


def _read_shape(
    path: Path, value: onnx.ValueInfoProto, image_size: Size | None
) -> tuple[np.dtype, tuple[int, ...], bool, bool]:
    """Return type, image shape, and whether batch and size are dynamic."""
    tensor = value.type.tensor_type
    kind = DTYPES.get(int(tensor.elem_type))
    sides = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if kind is None or len(sides) != 4:
        is_known = tensor.elem_type in onnx.TensorProto.DataType.values()
        name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if is_known else "an unknown type"
        dims = ", ".join("?" if side is None else str(side) for side in sides)
        raise UsageError(
            f"{path}: the input must be float [1, 3, H, W] or uint8 [1, H, W, 3], got {name} [{dims}]."
        )
    batch, *rest = sides
    if batch not in (None, 0, 1):
        raise UsageError(f"{path} has a fixed batch size of {batch}. Export it with a batch size of 1.")
    channels = 2 if kind == np.uint8 and rest[0] not in (1, 3) else 0
    rest[channels] = rest[channels] or 3
    any_size = None in rest or 0 in rest
    if any_size and image_size is None:
        raise UsageError(f"{path} has a dynamic image size. Set it with --image-size.")
    given = list(height_width(image_size or 0))
    given.insert(channels, 3)
    shape = tuple(side or default for side, default in zip(rest, given, strict=True))
    if max(shape) > MAX_SIDE:
        raise UsageError(f"{path}: an image side must be at most {MAX_SIDE:,} pixels, got {list(shape)}.")
    return kind, shape, batch in (None, 0), any_size


@dataclass(frozen=True)
class BenchFile:
    """A file to time."""

    path: Path
    source: Path
    name: str
    shown: str
    """Path in the results, relative to the source."""
    key: str | None
    """Name in the report of the run."""
    input: OnnxInput


@dataclass(frozen=True)
class BenchFiles:
    """Files to time, notes on files that are left out, and the run folders among the sources."""

    files: list[BenchFile]
    notes: list[str]
    runs: list[Path]


def find_bench_files(paths: Sequence[Path], copies: Path, image_size: Size | None = None) -> BenchFiles:
    """Return the files of ``paths`` that can be timed: of each run the teachers, fp32, then int8.

    Args:
        paths: run folders, artifact folders and .onnx files.
        copies: folder for copies of single files, which are timed instead of files that may change.
        image_size: that of the input if it is dynamic.
    """
    if not paths:
        raise UsageError("At least one run folder, artifact folder or .onnx file is required.")
    files: list[BenchFile] = []
    notes: list[str] = []
    untimed = explain_untimed(TARGETS)
    for number, path in enumerate(paths):
        models = open_files(path)
        if models[0].manifest is None:
            copy = copies / f"{number}.onnx"
            copy.write_bytes(models[0].content)
            model_input = read_input(copy, image_size, external_data=False, source=path)
            files.append(BenchFile(copy, path, path.stem, path.name, None, model_input))
            continue
        for teacher in find_teacher_files(path):
            key, shown = teacher.stem.replace(".", " "), teacher.relative_to(path).as_posix()
            files.append(BenchFile(teacher, path, key, shown, key, read_input(teacher, image_size)))
        keys = dict(REPORT_KEYS)
        for model in sorted(models, key=lambda model: model.precision != "fp32"):
            if model.target is not None and (reason := untimed.get(model.target)) is not None:
                notes.append(f"{model.path.name} is {reason}")
                continue
            report_key = keys.pop(str(model.precision), None)
            name = str(model.precision) if report_key else f"{model.precision} {model.target or ''}".rstrip()
            shown, file_input = model.path.relative_to(path).as_posix(), read_input(model.path, image_size)
            files.append(BenchFile(model.path, path, name, shown, report_key, file_input))
    if not files:
        raise UsageError(f"None of the files can be timed on this machine: {'; '.join(notes)}.")
    runs = [path for path in paths if (path / RECORD).is_file()]
    names = name_files((file.source, file.name) for file in files)
    if len(paths) > 1:  # several files have the same part in a report
        prefixes = dict(zip(paths, shorten_paths(paths), strict=True))
        files = [
            replace(file, key=None, shown=f"{prefixes[file.source]}/{file.shown}")
            if file.source.is_dir()
            else file
            for file in files
        ]
    return BenchFiles(
        [replace(file, name=name) for file, name in zip(files, names, strict=True)], notes, runs
    )


@dataclass(frozen=True)
class Predictions:
    """Class numbers of n images: ``labels`` [n], and ``classes`` [n] by the report's name of a file.

    ``keys`` int64 [n] are hashes of the images' content.
    """

    keys: np.ndarray
    labels: np.ndarray
    classes: Mapping[str, np.ndarray]

    def is_correct(self, file: str) -> np.ndarray:
        """Return bool [n] in the order of the images' keys."""
        return np.asarray((self.classes[file] == self.labels)[np.argsort(self.keys, kind="stable")])

    def has_same_images(self, other: "Predictions") -> bool:
        """Return True if both are of the same images."""
        return np.array_equal(np.sort(self.keys), np.sort(other.keys))


def write_predictions(
    path: Path, keys: np.ndarray, labels: np.ndarray, logits: Mapping[str, np.ndarray]
) -> None:
    """Write the classes with the largest ``logits``, [n,classes] by file; see ``Predictions``."""
    classes = {file: rows.argmax(1).astype(np.int32) for file, rows in logits.items()}
    with atomic_write(path) as part:
        save_file({"keys": keys, "labels": labels.astype(np.int32), **classes}, part)


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions, or None if there are none, as for multi-label data."""
    try:
        arrays = load_file(path)
        return Predictions(arrays.pop("keys"), arrays.pop("labels"), arrays)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({error}). {REGENERATE}") from error


def write_train_images(run: Path, keys: np.ndarray) -> None:
    """Write the keys, int64 [n], of the training images that can be read."""
    with atomic_write(run / TRAIN_IMAGES_FILE) as part:
        save_file({"keys": keys}, part)


def read_train_images(run: Path) -> frozenset[int]:
    """Return the keys of a run's training images, or an empty set before they are written."""
    file = run / TRAIN_IMAGES_FILE
    return frozenset(load_file(file)["keys"].tolist()) if file.exists() else frozenset()
