"""Hostile and damaged input against everything that reads what others have written.

    pip install atheris
    python benchmarks/fuzz.py manifest --seconds 60
    python benchmarks/fuzz.py all --seconds 60

Each target takes bytes and may do one of two things: read them, or raise the error that the command turns
into a sentence. Anything else is a crash: it is printed, kept under --out, and makes the exit code 1. Inputs
are made by atheris (libFuzzer), guided by which lines of ours they reach, from real files as seeds; each
target runs in a process of its own with a limit on memory and on the time of one input. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY_MB, SLOWEST_SECONDS = 2048, 10
OURS = ["questpress"]


@dataclass(frozen=True)
class Target:
    """``seeds`` are real inputs; ``make`` gives the function that reads one, once everything is imported."""

    seeds: Callable[[], list[bytes]]
    make: Callable[[Path], Callable[[bytes], None]]


def _image_seeds() -> list[bytes]:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    seeds = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        for mode in ("RGB", "L", "P"):
            buffer = io.BytesIO()
            image = Image.fromarray(pixels).convert(mode)
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            seeds.append(buffer.getvalue())
    return seeds


def _images(_work: Path) -> Callable[[bytes], None]:
    from questpress.export.runtime import ImageError, decode_image

    def read(content: bytes) -> None:
        try:
            pixels = decode_image(content)
        except ImageError:
            return
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and str(pixels.dtype) == "uint8"

    return read


def _onnx_seeds() -> list[bytes]:
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


def _onnx(work: Path) -> Callable[[bytes], None]:
    from questpress.export.errors import ExportError
    from questpress.export.foreign import read_foreign

    def read(content: bytes) -> None:
        file = work / "foreign.onnx"
        file.write_bytes(content)
        try:
            same, _ = read_foreign(file)
        except ExportError:
            return
        assert same == content

    return read


def _manifest_seeds() -> list[bytes]:
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


def _manifest(work: Path) -> Callable[[bytes], None]:
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


def _yaml(_work: Path) -> Callable[[bytes], None]:
    import yaml
    from questpress.pipeline import bounded_yaml

    def read(content: bytes) -> None:
        try:
            bounded_yaml.load(content.decode("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return

    return read


def _labels(suffix: str) -> Callable[[Path], Callable[[bytes], None]]:
    def make(work: Path) -> Callable[[bytes], None]:
        from questpress.pipeline.data.coco import read_coco
        from questpress.pipeline.data.label_rows import read_rows
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


def _weights_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    state = {"conv.weight": torch.ones(2, 3, 1, 1), "fc.bias": torch.zeros(2)}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "classes": ["a", "b"]}, buffer)
    return [save(state, {"labels": '["a", "b"]'}), buffer.getvalue()]


def _weights(work: Path) -> Callable[[bytes], None]:
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


def _run_seeds() -> list[bytes]:
    record = {
        "schema_version": 1,
        "stages": {"teacher": {"key": "k", "outputs": {}, "facts": {}}},
        "config": {},
    }
    return [json.dumps(record).encode()]


def _run(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.errors import UsageError
    from questpress.pipeline.run_folder import RunFolder

    def read(content: bytes) -> None:
        (work / "run.json").write_bytes(content)
        try:
            RunFolder(work, writes=False).open(fresh=False)
        except UsageError:
            return

    return read


def _store_seeds() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.arange(6, dtype=np.float16).reshape(2, 3))
    return [buffer.getvalue()]


def _store(work: Path) -> Callable[[bytes], None]:
    from questpress.pipeline.cache import CHECKSUMS, Cache

    cache = Cache(work / "cache")

    def write(folder: Path) -> None:
        (folder / "logits.npy").write_bytes(_store_seeds()[0])

    def read(content: bytes) -> None:
        entry = cache.put("answers", "key", write)
        # The checksums are what a damaged or edited entry is found by.
        (entry / CHECKSUMS).write_bytes(content)
        place = cache.get("answers", "key")
        assert place is None or (place / "logits.npy").read_bytes() == _store_seeds()[0]

    return read


TARGETS = {
    "images": Target(_image_seeds, _images),
    "onnx": Target(_onnx_seeds, _onnx),
    "manifest": Target(_manifest_seeds, _manifest),
    "yaml": Target(lambda: [b"teacher: resnet50\nset: {quest.tau: 0.2}\na: &a [1]\nb: *a\n"], _yaml),
    "csv": Target(lambda: [b"file,labels,role\na.jpg,cat dog,train\n"], _labels("csv")),
    "jsonl": Target(lambda: [b'{"file": "a.jpg", "labels": ["cat"], "role": "train"}\n'], _labels("jsonl")),
    "coco": Target(
        lambda: [
            b'{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}], '
            b'"annotations": [{"image_id": 1, "category_id": 1}]}'
        ],
        _labels("json"),
    ),
    "weights": Target(_weights_seeds, _weights),
    "run": Target(_run_seeds, _run),
    "store": Target(_store_seeds, _store),
}


def fuzz(name: str, seconds: int, corpus: Path, crashes: Path) -> None:
    """In this process: feed the target until the time is over or it crashes."""
    import atheris

    target = TARGETS[name]
    with atheris.instrument_imports(include=OURS), tempfile.TemporaryDirectory() as work:
        read = target.make(Path(work))
        atheris.Setup(
            [
                sys.argv[0], f"-max_total_time={seconds}", f"-timeout={SLOWEST_SECONDS}",
                f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={crashes}/", "-print_final_stats=1",
                "-verbosity=0", "-max_len=65536", str(corpus),
            ],
            read,
        )  # fmt: skip
        atheris.Fuzz()


def campaign(name: str, seconds: int, out: Path) -> bool:
    """One target in a process of its own; whether nothing crashed."""
    corpus, crashes = out / name / "corpus", out / name / "crashes"
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in TARGETS[name].seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    done = subprocess.run(
        [sys.executable, __file__, name, "--seconds", str(seconds), "--out", str(out), "--inside"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = done.stdout + done.stderr
    counted = re.search(r"number_of_executed_units:\s*(\d+)", told)
    runs = int(counted[1]) if counted else 0
    left = sorted(crashes.iterdir())
    verdict = "no crash" if not left and not done.returncode else f"CRASHED, see {crashes}"
    print(f"| {name} | {runs:,} | {seconds} s | {verdict} |", flush=True)
    if verdict != "no crash":
        print("\n".join(told.strip().splitlines()[-25:]))
    return verdict == "no crash"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("fuzzing"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        folder = asked.out / asked.target
        fuzz(asked.target, asked.seconds, folder / "corpus", folder / "crashes")
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("benchmarks/fuzz.py needs atheris: pip install atheris")
    print("| target | inputs | time | |\n|---|---|---|---|")
    names = list(TARGETS) if asked.target == "all" else [asked.target]
    fine = [campaign(name, asked.seconds, asked.out) for name in names]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
