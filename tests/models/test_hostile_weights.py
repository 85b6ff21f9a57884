"""Malicious weights files: nothing in them runs, and memory stays within the size of the file."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from questpress.models.build import build
from questpress.models.checkpoint import read_checkpoint
from questpress.models.errors import ModelError
from questpress.models.keys import find_prefix
from questpress.models.weights import load_into

from tests.support.little import Calls


def refused(file: Path) -> str:
    with pytest.raises(ModelError) as raised:
        read_checkpoint(file)
    message = str(raised.value)
    assert "\n" not in message and file.name in message
    return message


@pytest.mark.parametrize(
    "ending", ["pth", "pt", "th", "bin", "tar", "ckpt", "pkl", "safetensors", "onnx", ""]
)
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickle_never_runs(ending: str, form: str, tmp_path: Path) -> None:
    target = tmp_path / "was_run"
    content = {"state_dict": {"w": torch.zeros(1)}, "extra": Calls(os.mkdir, str(target))}
    file = tmp_path / f"weights.{ending}"
    if form == "plain":
        file.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    refused(file)
    assert not target.exists()


@pytest.mark.parametrize(
    "call",
    [
        Calls(eval, "__import__('os').mkdir('was_run')"),
        Calls(exec, "import os; os.mkdir('was_run')"),
        Calls(os.system, "mkdir was_run"),
        Calls(getattr, "x", "upper"),
        Calls(__import__, "antigravity"),
        Calls(torch.load, "x"),
        Calls(torch.hub.load, "a/b", "c"),
        Calls(torch.jit.load, "evil.pt"),
        Calls(open, "/etc/passwd"),
    ],
)
def test_no_function_is_called(call: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "extra": call}, tmp_path / "w.pth")
    assert "could run code" in refused(tmp_path / "w.pth")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("form", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_packed_archive_is_not_unpacked(form: int, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "w.pth", "w", form) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "w.pth").stat().st_size < 100_000
    assert "is a compressed archive" in refused(tmp_path / "w.pth")


def test_parts_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """Ten entries in the list of an archive, and all of them the same bytes."""
    file = tmp_path / "w.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data/0", bytes(1000))
        [entry] = archive.infolist()
        archive.filelist += [entry] * 9
    assert "its parts are larger" in refused(file)


def test_tensor_larger_than_its_storage_takes_no_memory(tmp_path: Path) -> None:
    storage = torch.zeros(4)._typed_storage()
    for size, stride in (((10**12,), (1,)), ((10**6, 10**6), (0, 0)), ((2,), (10**15,)), ((-1,), (1,))):
        made = Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())
        torch.save({"conv1.weight": made}, tmp_path / "w.pth")
        network = build("cifar_resnet8", num_classes=3, image_size=16)
        with pytest.raises(ModelError):
            load_into(network, read_checkpoint(tmp_path / "w.pth"))


@pytest.mark.parametrize("shape", [(6_000_000, 0), (80_000, 1)])
@pytest.mark.parametrize(("name", "head"), [("test_vit", "head"), ("cifar_resnet8", "fc")])
def test_head_without_values_takes_no_memory(
    name: str, head: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = []
    create = timm.create_model

    def record(*args: Any, num_classes: int, **options: Any) -> torch.nn.Module:
        created.append(num_classes)
        return create(*args, num_classes=num_classes, **options)

    monkeypatch.setattr(timm, "create_model", record)
    weights = build(name, num_classes=3, image_size=32).state_dict()
    torch.save(weights | {f"{head}.weight": torch.empty(shape), "x.y": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ModelError):
        load_into(build(name, num_classes=3, image_size=64), read_checkpoint(tmp_path / "w.pth"))
    assert max(created) < 1000


def test_tensor_that_repeats_its_values_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 64)}, tmp_path / "w.pth")
    assert "repeats its values" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda: torch.empty(2, 3, device="meta"), "without values"),
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_ones_are_refused(
    odd: Callable[[], torch.Tensor], message: str, tmp_path: Path
) -> None:
    torch.save({"w": torch.zeros(1), "odd": odd()}, tmp_path / "w.pth")
    refusal = refused(tmp_path / "w.pth")
    assert message in refusal and "'odd'" in refusal


def test_recursive_collection_is_visited_once(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content |= {str(n): content for n in range(300)}
    torch.save(content, tmp_path / "w.pth")
    assert "no weights" in refused(tmp_path / "w.pth")


def test_names_without_end_take_no_time_without_end() -> None:
    weights = {f"{n}.{n}.{n}.x{'.y' * 50}": torch.empty(0) for n in range(50_000)}
    assert find_prefix(weights, {"x": torch.empty(0)}) == ""


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors(b"{" + b'"a":{' * 100_000),
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        safetensors({"__metadata__": {"labels": 3}}),
    ],
)
def test_invalid_safetensors_is_refused_without_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    tracemalloc.start()
    refused(tmp_path / "w.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1, 2]", '{"a": [0]}', "9" * 5000, '{"a": 0, "b": 0}', "\x1b"]
)
def test_labels_of_another_form_are_no_labels(text: str, tmp_path: Path) -> None:
    header = {
        "__metadata__": {"labels": text, "class_to_idx": text},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, bytes(4)))
    assert read_checkpoint(tmp_path / "w.safetensors").label_names is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    assert "is not a regular file" in refused(tmp_path / "w.pth")
