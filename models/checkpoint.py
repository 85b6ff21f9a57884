"""Read weights from safetensors files and torch checkpoints without running code; write safetensors."""

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ModelError, shorten
from .plain_types import PLAIN_TYPES

StateDict = dict[str, Tensor]

AVERAGED = re.compile(r"(?:^|[._])(?:averaged?|avg|ema|swa)(?:[._]|$)", re.IGNORECASE)
"""Names of averaged weights, such as ``state_dict_ema``, ``params_ema`` and ``model_ema.module``."""

# Keys under which training programs store weights in a checkpoint.
_PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_NOT_WEIGHTS = ("optim", "scheduler", "scaler", "args", "config", "hyper", "rng")
_LABEL_KEYS = ("label_names", "labels", "class_names", "classes", "CLASSES")
_INDEX_KEYS = ("class_to_idx", "label2id", "idx_to_class", "id2label")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and their description."""

    state_dict: StateDict
    """Tensors by name, on the CPU."""
    label_names: tuple[str, ...] | None
    """Classes in the order of the logits, if the file contains them."""
    source: str
    """File or repository, for messages."""
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    """Text entries of a safetensors file."""
    label_descriptions: tuple[str, ...] | None = None
    """The classes in words, if their names are codes."""
    license: str | None = None
    """License of published weights."""
    notes: tuple[str, ...] = ()
    """Which of several collections of tensors in the file this is."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a safetensors file or a torch checkpoint, nested or not. Raises ModelError.

    A torch checkpoint is a pickle. It is always read with `weights_only=True`, which accepts tensors and
    plain values only.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise ModelError(f"Weights file {file} does not exist.")
        if file.is_dir():
            raise ModelError(f"{file} is a folder. Give a weights file (.safetensors, .pth, .th, .bin).")
        if not file.is_file():
            raise ModelError(f"{file} is not a regular file.")
        with file.open("rb") as stream:
            head = stream.read(9)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"Weights file {file} cannot be read: {error.strerror or error}.") from error
    metadata: dict[str, str] = {}
    if file.suffix == ".safetensors" or head[8:9] == b"{":
        tensors, metadata = _read_safetensors(file)
        labels = _labels({key: _from_json(value) for key, value in metadata.items()})
        where, others = "", set[str]()
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        if head[:1] == b"P":
            refuse_compressed(file)
        content = _read_torch(file)
        tensors, where, others = _find_weights(content, set())
        labels = _labels(content) if isinstance(content, Mapping) else None
    else:
        raise ModelError(f"{file} is neither a safetensors file nor a torch checkpoint.")
    if not tensors:
        raise ModelError(f"{file} contains no weights: it has no named tensors.")
    _refuse_unusual_tensors(tensors, file)
    source = f"{file.name} ({where})" if where else file.name
    notes = (f"{where}, not {', '.join(sorted(others))}",) if others else ()
    return Checkpoint(tensors, labels, source, digest, metadata, notes=notes)


def save_weights(network: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the network's state_dict as safetensors with text metadata; it is read back bit-equal."""
    # Tied weights share memory, which the format does not store; each name gets a copy.
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    _sort_metadata(Path(path))


def _sort_metadata(path: Path) -> None:
    """Sort the text metadata, which safetensors writes in random order, for equal bytes of equal weights."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ModelError(f"The header of {path} could not be sorted; this is a bug.")
        file.seek(8)
        file.write(text.ljust(length))


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a damaged header fails in many ways
        raise ModelError(f"Safetensors file {file} is damaged: {shorten(error)}.") from error


def refuse_compressed(file: Path) -> None:
    """Raise ModelError for archives that may expand to any size: compressed ones, and overlapping parts.

    torch writes neither.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"{file} is damaged or not a torch checkpoint: {shorten(error)}.") from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ModelError(f"{file} is a compressed archive. Extract it, or save it again with torch.")
    if sum(part.file_size for part in parts) > file.stat().st_size:
        raise ModelError(f"{file} is damaged: its parts are larger than the file.")


def _refuse_unusual_tensors(tensors: StateDict, file: Path) -> None:
    size = file.stat().st_size
    for name, tensor in tensors.items():
        unusual = tensor.is_quantized or tensor.is_nested or tensor.is_complex()
        if unusual or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise ModelError(
                f"{file}: tensor {name[:60]!r} is not a dense real tensor ({kind}). Save the state_dict as "
                "dense float tensors."
            )
        if tensor.nbytes > size:
            raise ModelError(
                f"{file}: tensor {name[:60]!r} repeats its values: it has {tensor.nbytes:,} bytes, the whole "
                f"file {size:,}. Save it with .contiguous()."
            )


def _read_torch(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems are raised as errors below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if match:
            raise ModelError(
                f"{file} was not loaded because it contains more than weights ({match[1] or match[2]}) and "
                "could run code. Save its state_dict alone, or as safetensors."
            ) from error
        raise ModelError(f"{file} is damaged or not a torch checkpoint.") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"{file} is damaged or not a torch checkpoint: {shorten(error)}.") from error


def tensors_digest(path: Path) -> str:
    """Return the SHA-256 of the tensors of a safetensors file, without its metadata. Raises ModelError.

    It covers names, types, shapes and bytes, so equal weights of different runs have equal digests.
    """
    digest = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"Safetensors file {path} is damaged: {shorten(error)}.") from error
    return digest.hexdigest()


def _find_weights(content: Any, seen: set[int], depth: int = 0) -> tuple[StateDict, str, set[str]]:
    """Return the named tensors in a checkpoint, the keys that lead to them, and those of similar collections.

    Averaged weights are preferred, then those under a usual name, then the largest collection. Collections in
    `seen` are skipped: a collection may contain itself.
    """
    if not isinstance(content, Mapping) or depth > 4 or id(content) in seen:
        return {}, "", set()
    seen.add(id(content))
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    nested: dict[str, tuple[StateDict, str, set[str]]] = {}
    for key, value in content.items():
        if isinstance(key, str) and not key.lower().startswith(_NOT_WEIGHTS):
            weights, inner, others = _find_weights(value, seen, depth + 1)
            if weights:
                path = f"{key}.{inner}" if inner else key
                nested[key] = (weights, path, {f"{key}.{other}" for other in others})
    sizes = {key: _count_values(weights) for key, (weights, *_) in nested.items()}
    own, largest = _count_values(tensors), max(sizes.values(), default=0)
    # Averages of parameters alone, without the statistics of BatchNorm, are not the network.
    averaged = [key for key in nested if AVERAGED.search(nested[key][1]) and sizes[key] >= max(own, largest)]
    if not averaged and own >= largest:
        return tensors, "", set()
    whole = [key for key in nested if 2 * sizes[key] >= max(own, largest)]
    best = next((key for key in (*averaged, *_PLAIN) if key in whole), None)
    best = best or max(nested, key=sizes.__getitem__)
    weights, path, others = nested[best]
    others = others | {nested[key][1] for key in whole if key != best}
    return weights, path, others | ({"the top level"} if 2 * own >= sizes[best] else set())


def _count_values(weights: StateDict) -> int:
    """Return the number of tensors without those of one number, which are counters."""
    return sum(value.numel() != 1 for value in weights.values())


def _labels(content: Mapping[Any, Any], depth: int = 0) -> tuple[str, ...] | None:
    """Return the class names in the order of the logits if a checkpoint has them under a usual key."""
    for key in _LABEL_KEYS:
        names = content.get(key)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    for key in _INDEX_KEYS:
        if (ordered := _ordered(content.get(key))) is not None:
            return ordered
    for key in ("meta", "pretrained_cfg", "config", "hyper_parameters"):
        inner = content.get(key)
        if isinstance(inner, Mapping) and depth < 2 and (names := _labels(inner, depth + 1)) is not None:
            return names
    return None


def _ordered(table: Any) -> tuple[str, ...] | None:
    """Return names by number from {name: number} or {number: name}; None unless numbers are consecutive."""
    if not isinstance(table, Mapping) or not table:
        return None
    by_number: dict[int, str] = {}
    for key, value in table.items():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if not isinstance(number, int) or not isinstance(name, str):
            return None
        by_number[number] = name
    if sorted(by_number) != list(range(len(table))):
        return None
    return tuple(by_number[number] for number in range(len(table)))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
