"""What fuzz.py feeds to the readers of networks: ONNX files, artifacts, weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def onnx_seeds() -> list[bytes]:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(**more: object) -> bytes:
        weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
        graph = helper.make_graph(
            [
                helper.make_node("Conv", ["x", "w"], ["c"]),
                helper.make_node("GlobalAveragePool", ["c"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2, 1, 1])],
            [weight],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        made.ir_version = 10
        if more:
            helper.set_model_props(made, {str(key): str(value) for key, value in more.items()})
        return bytes(made.SerializeToString())

    outside = onnx.ModelProto.FromString(model())
    tensor = outside.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return [model(), model(questpress="1"), outside.SerializeToString()]


def onnx(work: Path) -> Callable[[bytes], None]:
    from questpress.export.conversion.untrusted import read_foreign
    from questpress.export.errors import ExportError
    from questpress.export.runtime import ArtifactError, refuse_outside

    def read(content: bytes) -> None:
        file = work / "foreign.onnx"
        file.write_bytes(content)
        try:
            same, _ = read_foreign(file)
        except ExportError:
            return
        assert same == content
        with suppress(ArtifactError):  # of fields and values that ONNX does not have it refuses more
            refuse_outside(content, "foreign.onnx")

    return read


def device(_work: Path) -> Callable[[bytes], None]:
    """Without onnx: whatever onnx finds to lie in another file must be refused."""
    import onnx
    from google.protobuf.message import DecodeError
    from questpress.export.conversion.untrusted import _tensors, graphs
    from questpress.export.runtime import ArtifactError, refuse_outside

    def read(content: bytes) -> None:
        try:
            refuse_outside(content, "artifact.onnx")
        except ArtifactError:
            return
        try:
            model = onnx.ModelProto.FromString(content)
        except (DecodeError, ValueError):
            return
        trained = [one for info in model.training_info for one in (info.initialization, info.algorithm)]
        for graph, _ in graphs(model.graph, *model.functions, *trained):
            for tensor in _tensors(graph):
                assert not tensor.external_data and tensor.data_location != onnx.TensorProto.EXTERNAL

    return read


def manifest_seeds() -> list[bytes]:
    manifest = {
        "schema_version": 1,
        "preprocessing": {
            "size": 32, "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "center",
            "mean": [0.5] * 3, "std": [0.25] * 3,
        },
        "labels": ["a", "b"],
        "origin": {},
        "files": [
            {"name": "student.onnx", "precision": "fp32", "target": None, "bytes": 3, "sha256": "0" * 64}
        ],
    }  # fmt: skip
    several = {**manifest, "task": "multi-label", "thresholds": [0.5, 0.5]}
    return [json.dumps(one).encode() for one in (manifest, several)]


def manifest(work: Path) -> Callable[[bytes], None]:
    from questpress.export.runtime import ArtifactError, Classifier

    folder = work / "artifact"
    folder.mkdir()

    def read(content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        try:
            Classifier.load(folder, threads=1)
        except ArtifactError:
            return
        raise AssertionError("it loaded a file that is not there")

    return read


def weights_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    state = {"conv.weight": torch.ones(2, 3, 1, 1), "fc.bias": torch.zeros(2)}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "classes": ["a", "b"]}, buffer)
    return [save(state, {"labels": '["a", "b"]'}), buffer.getvalue()]


def weights(work: Path) -> Callable[[bytes], None]:
    from questpress.models.checkpoint import read_checkpoint
    from questpress.models.errors import ModelError

    files = [work / "weights.safetensors", work / "weights.pth"]

    def read(content: bytes) -> None:
        for file in files:
            file.write_bytes(content)
            try:
                read_checkpoint(file)
            except ModelError as error:
                assert "\n" not in str(error)

    return read
