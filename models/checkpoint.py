"""Weights in files: reading what people have (never running what is in it), writing plain safetensors."""

import argparse
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

from .errors import ModelError

StateDict = dict[str, Tensor]

# Where training programs put the weights inside a checkpoint, the averaged ones first as timm takes them.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_NOT_WEIGHTS = ("optim", "scheduler", "scaler", "args", "config", "hyper", "rng")
_LABEL_KEYS = ("label_names", "labels", "class_names", "classes", "CLASSES")
_INDEX_KEYS = ("class_to_idx", "label2id", "idx_to_class", "id2label")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what is known of them.

    state_dict: tensors by name, on the CPU. label_names: the classes in the order of the logits, if the file
    knows them; label_descriptions: the same in words, where the names are codes. source: a phrase for people.
    sha256: of the file. metadata: a safetensors file's own text entries. licence: of published weights.
    """

    state_dict: StateDict
    label_names: tuple[str, ...] | None
    source: str
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    label_descriptions: tuple[str, ...] | None = None
    licence: str | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a safetensors file or a torch checkpoint, nested or not. Raises ModelError, one sentence.

    A torch checkpoint is a pickle; only tensors and plain values in it are accepted (`weights_only=True`),
    and there is no other way in.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise ModelError(f"There is no weights file {file}.")
        if file.is_dir():
            raise ModelError(
                f"{file} is a folder; name the weights file in it (.safetensors, .pth, .th, .bin)."
            )
        if not file.is_file():
            raise ModelError(f"{file} is no file, but something that would be waited for.")
        with file.open("rb") as stream:
            head = stream.read(9)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"The weights file {file} cannot be read: {error.strerror or error}.") from error
    metadata: dict[str, str] = {}
    if file.suffix == ".safetensors" or head[8:9] == b"{":
        tensors, metadata = _read_safetensors(file)
        labels = _labels({key: _from_json(value) for key, value in metadata.items()})
        where = ""
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        if head[:1] == b"P":
            refuse_packed(file)
        content = _read_torch(file)
        tensors, where = _find_weights(content, set())
        labels = _labels(content) if isinstance(content, Mapping) else None
    else:
        raise ModelError(f"{file} is neither a safetensors file nor a torch checkpoint.")
    if not tensors:
        raise ModelError(f"There are no weights in {file}: it holds no named tensors.")
    _refuse_odd(tensors, file)
    source = f"{file.name} ({where})" if where else file.name
    return Checkpoint(tensors, labels, source, digest, metadata)


def save_weights(network: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the network's plain state_dict as safetensors, with text metadata; it is read back bit-equal."""
    # Tied weights share memory, which the format doesn't store; each name gets its own copy.
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    _sort_metadata(Path(path))


def _sort_metadata(path: Path) -> None:
    """Give equal weights equal bytes: safetensors writes text metadata in an order of chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ModelError(f"The header of {path} could not be written in order; this is a defect.")
        file.seek(8)
        file.write(text.ljust(length))


def load_saved(path: str | Path) -> Checkpoint:
    """Read what `save_weights` wrote; its metadata is in the checkpoint's `metadata`."""
    return read_checkpoint(path)


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a damaged header fails in many ways
        raise ModelError(f"The safetensors file {file} is damaged: {_brief(error)}.") from error


def refuse_packed(file: Path) -> None:
    """torch writes its archives as they are: one that is packed, or whose parts lie over each other, may come
    to any size when it is read.

    Raises:
        ModelError: this is one.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except Exception as error:  # as above
        raise ModelError(
            f"The checkpoint {file} is damaged or not a torch checkpoint: {_brief(error)}."
        ) from error
    if any(one.compress_type != zipfile.ZIP_STORED for one in parts):
        raise ModelError(f"The checkpoint {file} is a packed archive; unpack it, or save it with torch anew.")
    if sum(one.file_size for one in parts) > file.stat().st_size:
        raise ModelError(f"The checkpoint {file} is damaged: it says to hold more bytes than it has.")


def _refuse_odd(tensors: StateDict, file: Path) -> None:
    """Weights are real numbers that lie in memory one after another; nothing else can be loaded into a
    network.
    """
    for name, tensor in tensors.items():
        packed = tensor.is_quantized or tensor.is_nested or tensor.is_complex()
        if packed or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without numbers" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise ModelError(
                f"The checkpoint {file} holds a tensor {name[:60]!r} that is no plain one ({kind}); save its "
                "state_dict as dense float numbers."
            )


def _read_torch(file: Path) -> Any:
    try:
        # timm's training checkpoints keep their command line as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd in it is told in a sentence
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if found:
            raise ModelError(
                f"The checkpoint {file} holds more than weights ({found[1] or found[2]}) and could run code "
                f"when opened, so it was not loaded; save its state_dict alone, or as safetensors."
            ) from error
        raise ModelError(f"The checkpoint {file} is damaged or not a torch checkpoint.") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(
            f"The checkpoint {file} is damaged or not a torch checkpoint: {_brief(error)}."
        ) from error


def tensors_digest(path: Path) -> str:
    """SHA-256 over the names, types, shapes and bytes of a safetensors file's tensors, whatever it says of
    itself: of equal weights equal, whichever run wrote them. Raises ModelError.
    """
    found = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"The safetensors file {path} is damaged: {_brief(error)}.") from error
    return found.hexdigest()


def _find_weights(content: Any, seen: set[int], depth: int = 0) -> tuple[StateDict, str]:
    """The named tensors in a checkpoint, and under which keys they lay.

    The averaged weights where there are any, else those under a usual name, else the largest collection. What
    was ``seen`` is not looked at again: a collection may hold itself, and many times.
    """
    if not isinstance(content, Mapping) or depth > 4 or id(content) in seen:
        return {}, ""
    seen.add(id(content))
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    nested: dict[str, tuple[StateDict, str]] = {}
    for key, value in content.items():
        if isinstance(key, str) and not key.lower().startswith(_NOT_WEIGHTS):
            found, inner = _find_weights(value, seen, depth + 1)
            if found:
                nested[key] = (found, f"{key}.{inner}" if inner else key)
    largest = max((len(found) for found, _ in nested.values()), default=0)
    if len(tensors) >= largest:
        return tensors, ""
    for name in (*_AVERAGED, *_PLAIN):
        # A few averaged tensors beside a whole network are not the network.
        if name in nested and 2 * len(nested[name][0]) >= largest:
            return nested[name]
    return max(nested.values(), key=lambda entry: len(entry[0]))


def _labels(content: Mapping[Any, Any], depth: int = 0) -> tuple[str, ...] | None:
    """The class names in the order of the logits, where a checkpoint has them under a usual name."""
    for key in _LABEL_KEYS:
        names = content.get(key)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    for key in _INDEX_KEYS:
        ordered = _ordered(content.get(key))
        if ordered is not None:
            return ordered
    for key in ("meta", "pretrained_cfg", "config", "hyper_parameters"):
        inner = content.get(key)
        if isinstance(inner, Mapping) and depth < 2 and (found := _labels(inner, depth + 1)) is not None:
            return found
    return None


def _ordered(table: Any) -> tuple[str, ...] | None:
    """Names by number from {name: number} or {number: name}; None unless the numbers are 0, 1, 2, …"""
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


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"
