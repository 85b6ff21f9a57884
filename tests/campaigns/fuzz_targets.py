"""Fuzzing targets: each reader of untrusted input, with valid inputs to start from.

A target reads bytes, or raises the error that the command reports.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Valid inputs, and a factory of the function that reads an input after all imports."""

    seeds: Callable[[], list[bytes]]
    make: Callable[[Path], Callable[[bytes], None]]


def image_seeds() -> list[bytes]:
    import numpy as np
    from PIL import Image

    Image.init()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    kinds = (
        "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "DIB",
        "JPEG2000", "AVIF", "MPO", "QOI",
    )  # fmt: skip
    for kind in kinds:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "LAB", "F"):
            buffer = io.BytesIO()
            try:
                image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
                image = image.convert("I").convert("I;16") if mode == "I;16" else image
                image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            except (OSError, KeyError, ValueError):
                continue  # this format has no such mode, or this Pillow no such format
            seeds.append(buffer.getvalue())
    return seeds


def image_reader(_work: Path) -> Callable[[bytes], None]:
    from questpress.export.runtime import ImageError, decode_image

    def read(content: bytes) -> None:
        try:
            pixels = decode_image(content)
        except ImageError:
            return
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and str(pixels.dtype) == "uint8"

    return read


def label_reader(suffix: str) -> Callable[[Path], Callable[[bytes], None]]:
    def make(work: Path) -> Callable[[bytes], None]:
        from questpress.pipeline.data.sources.coco import read_coco
        from questpress.pipeline.data.sources.label_rows import read_rows
        from questpress.pipeline.errors import UsageError

        file = work / f"labels.{suffix}"

        def read(content: bytes) -> None:
            file.write_bytes(content)
            try:
                read_coco(file) if suffix == "json" else read_rows(file)
            except UsageError as error:
                assert "\n" not in str(error)

        return read

    return make


def shard_seeds() -> list[bytes]:
    import tarfile

    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, content in (
                ("a/0.png", image_seeds()[0]),
                ("a/0.cls", b"1"),
                ("b.json", b'{"label": 1}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        seeds.append(buffer.getvalue())
    return seeds


def shard_reader(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.data.sources.webdataset import find_shards, index_shards
    from questpress.pipeline.errors import UsageError

    def read(content: bytes) -> None:
        (work / "train.tar").write_bytes(content)
        splits = find_shards(work)
        if splits is None:
            return
        try:
            indexed, _ = index_shards(splits)
        except UsageError as error:
            assert "\n" not in str(error)
            return
        assert all(len(image.read()) <= len(content) for images in indexed.values() for image in images)

    return read


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


def onnx_reader(work: Path) -> Callable[[bytes], None]:
    from questpress.export.conversion.untrusted import read_untrusted
    from questpress.export.errors import ExportError
    from questpress.export.runtime import ArtifactError, refuse_external_data

    def read(content: bytes) -> None:
        file = work / "untrusted.onnx"
        file.write_bytes(content)
        try:
            same, _ = read_untrusted(file)
        except ExportError:
            return
        assert same == content
        with suppress(ArtifactError):  # of fields and values that ONNX does not have it refuses more
            refuse_external_data(content, "untrusted.onnx")

    return read


def device_reader(_work: Path) -> Callable[[bytes], None]:
    """Without onnx: whatever onnx finds to lie in another file must be refused."""
    import onnx
    from google.protobuf.message import DecodeError
    from questpress.export.conversion.untrusted import walk_graphs, walk_tensors
    from questpress.export.runtime import ArtifactError, refuse_external_data

    def read(content: bytes) -> None:
        try:
            refuse_external_data(content, "artifact.onnx")
        except ArtifactError:
            return
        try:
            model = onnx.ModelProto.FromString(content)
        except (DecodeError, ValueError):
            return
        training_graphs = [
            value for info in model.training_info for value in (info.initialization, info.algorithm)
        ]
        for graph, _ in walk_graphs(model.graph, *model.functions, *training_graphs):
            for tensor in walk_tensors(graph):
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
    return [json.dumps(value).encode() for value in (manifest, several)]


def manifest_reader(work: Path) -> Callable[[bytes], None]:
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


def weights_reader(work: Path) -> Callable[[bytes], None]:
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


def yaml_reader(_work: Path) -> Callable[[bytes], None]:
    import yaml
    from questpress.pipeline.config.limits import parse_yaml

    def read(content: bytes) -> None:
        try:
            parse_yaml(content.decode("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return

    return read


def json_reader(_work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.runs import record

    def read(content: bytes) -> None:
        with suppress(ValueError):
            record.parse_json(content.decode("utf-8"))

    return read


def run_seeds() -> list[bytes]:
    stage = {"key": "k", "summary": "s", "seconds": 1.0, "outputs": {}, "warnings": [], "facts": {}}
    record = {"schema_version": 1, "stages": {"teacher": stage}, "config": {"rounds": 2}, "command": "c"}
    return [json.dumps(record).encode()]


def run_reader(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.errors import UsageError
    from questpress.pipeline.runs.folder import RunFolder

    def read(content: bytes) -> None:
        (work / "run.json").write_bytes(content)
        try:
            RunFolder(work, writes=False).open(fresh=False)
        except UsageError:
            return

    return read


def cache_seeds() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.arange(6, dtype=np.float16).reshape(2, 3))
    return [buffer.getvalue()]


def cache_reader(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.runs.cache import CHECKSUMS, Cache

    cache = Cache(work / "cache")

    def write(folder: Path) -> None:
        (folder / "logits.npy").write_bytes(cache_seeds()[0])

    def read(content: bytes) -> None:
        entry = cache.put("outputs", "key", write)
        # Damaged entries are detected by their checksums.
        (entry / CHECKSUMS).write_bytes(content)
        place = cache.get("outputs", "key")
        assert place is None or (place / "logits.npy").read_bytes() == cache_seeds()[0]

    return read


TARGETS = {
    "images": Target(image_seeds, image_reader),
    "onnx": Target(onnx_seeds, onnx_reader),
    "device": Target(onnx_seeds, device_reader),
    "manifest": Target(manifest_seeds, manifest_reader),
    "yaml": Target(lambda: [b"teacher: resnet50\nset: {quest.tau: 0.2}\na: &a [1]\nb: *a\n"], yaml_reader),
    "csv": Target(lambda: [b"file,labels,role\na.jpg,cat dog,train\n"], label_reader("csv")),
    "jsonl": Target(
        lambda: [b'{"file": "a.jpg", "labels": ["cat"], "role": "train"}\n'],
        label_reader("jsonl"),
    ),
    "coco": Target(
        lambda: [
            b'{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}], '
            b'"annotations": [{"image_id": 1, "category_id": 1}]}'
        ],
        label_reader("json"),
    ),
    "shards": Target(shard_seeds, shard_reader),
    "json": Target(manifest_seeds, json_reader),
    "weights": Target(weights_seeds, weights_reader),
    "run": Target(run_seeds, run_reader),
    "cache": Target(cache_seeds, cache_reader),
}
