"""The manifest of an artifact folder, the metadata of a model file, and the files that they describe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .errors import ArtifactError
from .outputs import Decoder
from .preprocessing import SCHEMA_VERSION, Preprocessing, check_numbers, height_width
from .processor import bench_file_name, lacks_dot_products, processor_name, runnable_targets
from .session import CPU

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26  # 21,000 classes take a third of a million
MAX_FILE_BYTES = (1 << 31) - 1  # the limit of protobuf, and so of an ONNX file
METADATA_PREFIX = "questpress."
MULTI_LABEL = "multi-label"
DETECTION = "detection"
UINT8 = "uint8"


def build_metadata(
    preprocessing: Preprocessing,
    labels: Sequence[str],
    origin: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    *,
    takes_pixels: bool = False,
) -> dict[str, str]:
    """Return the entries of `metadata_props` with which an .onnx file can be used without its folder.

    `names`, `imgsz`, `task` and `stride` are for readers of other tools, in the form that Ultralytics writes.
    `origin` names teachers, student, method and licenses, as any JSON. `thresholds`, one per label, make it a
    multi-label model. With `takes_pixels` its input is rendered images, uint8 [batch, H, W, 3].
    """
    entries = {
        "version": str(SCHEMA_VERSION),
        "preprocessing": json.dumps(preprocessing.to_dict(), sort_keys=True),
        "labels": json.dumps(list(labels), ensure_ascii=False),
        "origin": json.dumps(dict(origin), sort_keys=True, ensure_ascii=False),
    }
    if takes_pixels:
        entries = {"input": UINT8, **entries}
    if thresholds is not None:
        values = json.dumps([float(threshold) for threshold in thresholds])
        entries = {"task": MULTI_LABEL, "thresholds": values, **entries}
    return {
        **{METADATA_PREFIX + key: value for key, value in entries.items()},
        "names": repr(dict(enumerate(labels))),
        "imgsz": repr(list(height_width(preprocessing.size))),
        "task": "classify",
        "stride": "1",
    }


def decoder_metadata(decoder: Mapping[str, Any]) -> dict[str, str]:
    """Return the further entries of a detector's metadata, see `build_metadata`; `decoder` as JSON."""
    parsed = Decoder.from_dict(decoder)
    about = {"task": DETECTION, "decoder": json.dumps(parsed.to_dict(), sort_keys=True)}
    stride = max((max(level.stride) for level in parsed.anchors), default=1.0)
    return {
        **{METADATA_PREFIX + key: value for key, value in about.items()},
        "task": "detect",
        "stride": str(round(stride)),
    }


_INVALID_JSON = (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of any content may raise: too large numbers and too deep nesting included."""


def _check_labels(labels: Any) -> list[str]:
    """Raise ValueError unless it is a list of strings that is not empty."""
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be strings")
    return labels


@dataclass(frozen=True)
class Description:
    """What a manifest, or the metadata of a file, describes of a model."""

    preprocessing: Preprocessing
    labels: list[str]
    thresholds: list[float] | None = None
    decoder: Decoder | None = None

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Description:
        """Raise ValueError if an entry is invalid, or the task is unknown."""
        preprocessing, labels = entries["preprocessing"], _check_labels(entries["labels"])
        about, task = cls(Preprocessing.from_dict(preprocessing), labels), entries.get("task")
        if task is None:
            return about
        if task == MULTI_LABEL:
            thresholds = check_numbers("thresholds", entries["thresholds"], len(labels), 0.0, 1.0)
            return replace(about, thresholds=[float(threshold) for threshold in thresholds])
        if task == DETECTION:
            return replace(about, decoder=Decoder.from_dict(entries["decoder"]))
        raise ValueError(f"unknown task {task!r}")


def read_metadata(session: ort.InferenceSession, name: str, *, required: bool) -> Description | None:
    entries = {
        key[len(METADATA_PREFIX) :]: value
        for key, value in session.get_modelmeta().custom_metadata_map.items()
        if key.startswith(METADATA_PREFIX)
    }
    version = entries.get("version")
    if version is None:
        if required:
            raise ArtifactError(f"{name} has no questpress metadata. Load its artifact folder instead")
        return None
    if version != str(SCHEMA_VERSION):
        raise ArtifactError(f"{name} has version {version}, this runtime supports version {SCHEMA_VERSION}")
    try:
        values: dict[str, Any] = {"task": entries.get("task")}
        for key in ("preprocessing", "labels", "thresholds", "decoder"):
            if key in entries:
                values[key] = json.loads(entries[key])
        return Description.from_dict(values)
    except _INVALID_JSON as error:
        raise ArtifactError(f"the questpress metadata of {name} is invalid: {error}") from error


def read_manifest(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the artifact folder at `path`, or in the run folder there, and its validated manifest.

    The files in it are not read; see `read_verified`. Raises ArtifactError.
    """
    path = Path(path)
    folder = next((f for f in (path, path / "artifact") if (f / MANIFEST).is_file()), None)
    if folder is None:
        models = sorted(path.glob("student*.onnx")) if path.is_dir() else []
        if models:
            raise ArtifactError(
                f"{path} contains {models[0].name} but no {MANIFEST}. Copy the artifact folder again"
            )
        problem = f"contains no {MANIFEST}" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {problem}. Specify a run folder, an artifact folder or an .onnx file")
    file = folder / MANIFEST
    try:
        if (size := file.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size:,} bytes exceed the limit of {MAX_MANIFEST_BYTES:,}")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, (bool, float)):
            raise ArtifactError(
                f"{file} has version {version!r}, this runtime supports version {SCHEMA_VERSION}"
            )
        if manifest["checksum"] != compute_checksum(manifest):
            raise ArtifactError(
                f"{file} was modified after it was written: its checksum differs. Copy the artifact folder "
                "again, or export the run again"
            )
        Description.from_dict(manifest)
        if "self_test" in manifest:
            _check_entry(manifest["self_test"])
        for entry in manifest["files"]:
            _check_entry(entry)
            str(entry["precision"])
            if not isinstance(entry.setdefault("target", None), (str, type(None))):
                raise ValueError(f"invalid target {entry['target']!r}")
    except _INVALID_JSON as error:
        raise ArtifactError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return folder, manifest


def _check_entry(entry: Any) -> None:
    """Raise ValueError, KeyError or TypeError if a file's entry is invalid or of another folder."""
    if not isinstance(entry["name"], str) or Path(entry["name"]).name != entry["name"]:
        raise ValueError(f"invalid file name {entry['name']!r}")
    int(entry["bytes"]), str(entry["sha256"])


def compute_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, except its checksum, as JSON: sorted keys, no spaces, ASCII."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_file(path: Path) -> bytes:
    """Return a model file's content. Raises ArtifactError, also for a pipe or device, which could block."""
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ArtifactError(f"{path} cannot be read: ONNX files are limited to 2 GB")
            return file.read()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_verified(folder: Path, entry: Mapping[str, Any]) -> bytes:
    """Return the content of a file of the manifest. Raises ArtifactError if its size or checksum differ."""
    path = folder / entry["name"]
    try:
        content = read_file(path)
    except ArtifactError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        fp32 = folder / "student.onnx"
        alternative = f", or use the fp32 file, {fp32.name}" if fp32.is_file() else ""
        raise ArtifactError(
            f"{path} is listed in {MANIFEST} but missing. Copy the artifact folder again{alternative}"
        ) from error
    if len(content) != entry["bytes"]:
        raise ArtifactError(
            f"{path} is damaged: it has {len(content)} bytes, {MANIFEST} lists {entry['bytes']}. "
            "Copy the artifact folder again"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ArtifactError(
            f"{path} is damaged: its sha256 differs from {MANIFEST}. Copy the artifact folder again"
        )
    return content


def choose_file(
    files: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    name: str | None,
    precision: str | None,
    threads: int,
) -> Mapping[str, Any]:
    """Return the file named, or the first of the precision for this processor, by default the faster one.

    The faster one is that of the results of `predict.py --bench` in the folder, if their intervals do not
    overlap, otherwise int8 unless the processor lacks dot products. If all int8 files are for other
    processors, the fp32 file is used.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for target in runnable_targets():
        for entry in files:
            if entry["name"] == name:
                return entry
            if entry["target"] == target:
                best.setdefault(entry["precision"], entry)
    if name is None:
        if precision is None and {"int8", "fp32"} <= best.keys():
            usual = "fp32" if lacks_dot_products() else "int8"
            return _find_faster((best["int8"], best["fp32"]), folder, threads) or best[usual]
        for wanted in ("int8", "fp32") if precision in (None, "int8") else (precision,):
            if wanted in best:
                return best[wanted]
    available = ", ".join(f"{entry['name']} ({entry['precision']})" for entry in files) or "no files"
    wanted = name or f"{precision or 'int8'} file"
    raise ArtifactError(f"{folder} contains no {wanted}. Its manifest lists {available}")


def _find_faster(
    entries: Sequence[Mapping[str, Any]], folder: Path, threads: int
) -> Mapping[str, Any] | None:
    """Return the file that was faster when `predict.py --bench` ran on this processor, None if unknown."""
    if next(folder.glob("bench.*.json"), None) is None:
        return None
    try:
        bench = json.loads((folder / bench_file_name(processor_name())).read_text(encoding="utf-8"))
        is_disturbed = any(flag["threads"] == threads for flag in bench["flags"])
        times = {
            (result["name"], result["sha256"]): result["latency_ms"]["p50"]
            for result in bench["results"]
            if result["threads"] == threads
        }
        first, second = (times[entry["name"], entry["sha256"]] for entry in entries)
        if is_disturbed or bench["provider"] != CPU:
            return None
        if first["high"] < second["low"]:
            return entries[0]
        return entries[1] if second["high"] < first["low"] else None
    except _INVALID_JSON:
        return None
