"""Accuracy lost by int8: ONNX Runtime's defaults, the search, and the search with --qat.

    python -m benchmarks.int8.accuracy runs/shop --out results/int8-accuracy

For each finished run (its folder is copied, and stays as it is) the fp32 file is compared on the test role
with

- naive: `onnxruntime.quantization.quantize_static` with its defaults, calibrated on the run's own images
- ours: `compress export` with its defaults
- learned: what --qat alone gives, quantized with the weights and ranges that it learned
- ours, --qat: `compress export --qat`, which ships the best of both

Points lost, and McNemar's exact test over the test images, which had no part in any choice.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from questpress.export.int8.quantizer import calibrate_ranges, prepare, quantize, quiet, write_int8
from questpress.export.int8.targets import find_target
from questpress.export.runtime import Classifier, render
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.api.run import export
from questpress.pipeline.config.options import Options
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.evaluation.comparison import mcnemar
from questpress.pipeline.stages.qat import load_graph


class Chunks(CalibrationDataReader):
    """Images [n,3,S,S] in batches of eight."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter(np.array_split(images, max(1, len(images) // 8)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--qat-epochs", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for run in arguments.runs for row in measure(run, arguments.out, arguments.qat_epochs)]
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = markdown(rows)
    (arguments.out / "results.md").write_text(table, encoding="utf-8")
    print(table, end="")


def measure(run: Path, out: Path, qat_epochs: int | None) -> list[dict[str, Any]]:
    """Return a row for each file of a run's student."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    options = Options(**{name: value for name, value in config.items() if name in Options.model_fields})
    _, data = resolve(options)
    fp32 = run / "artifact" / "student.onnx"
    classifier = Classifier(fp32.read_bytes(), fp32.name)
    test = read(data.test, classifier)
    labels = np.array([image.label for image in data.test])
    expected = is_correct(fp32, test, labels)
    folder = out / run.name
    folder.mkdir(exist_ok=True)
    files = {"naive": quantize_naively(fp32, data.train, options, folder / "naive.onnx")}
    chosen = {}
    for name, more in {
        "ours": {"qat": False, "calibration": "auto"},
        "ours, --qat": {"qat": True, "qat_epochs": qat_epochs, "calibration": "auto"},
    }.items():
        copy = folder / name.replace(", --", "-")
        if not copy.exists():
            shutil.copytree(run, copy)
        given = {key: value for key, value in more.items() if value is not None}
        report = export(copy, quiet=True, **given)
        best = next((candidate for candidate in report.int8[0].tried if candidate.ships), None)
        files[name] = copy / (report.int8[0].file or "artifact/student.onnx")
        chosen[name] = "the fp32 file" if best is None else best.name
    images = next(iter(read_calibration_images(fp32, data.train, options)))
    files["learned"] = quantize_learned(folder / "ours-qat", fp32, images, folder / "learned.onnx")
    chosen["learned"] = f"{report.recovery.epochs} epochs" if report.recovery else ""
    rows = [{"run": run.name, "file": "fp32", "n": len(labels), "top1": 100 * float(expected.mean())}]
    for name, file in files.items():
        correct = is_correct(file, test, labels)
        worse, better = int((expected & ~correct).sum()), int((correct & ~expected).sum())
        rows.append(
            {
                "run": run.name,
                "file": name,
                "how": chosen.get(name, "quantize_static's defaults"),
                "n": len(labels),
                "top1": 100 * float(correct.mean()),
                "lost": 100 * (worse - better) / len(labels),
                "worse": worse,
                "better": better,
                "p": mcnemar(worse, better),
            }
        )
    return rows


def read(images: Iterable[Image], classifier: Classifier) -> np.ndarray:
    """Return decoded and preprocessed images as the model takes them."""
    contents = (image.read() for image in images)
    decoded = (classifier.decode(item) if isinstance(item, bytes) else item for item in contents)
    return classifier.to_input(np.stack([render(pixels, classifier.preprocessing) for pixels in decoded]))


def is_correct(file: Path, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return True for each image that a file classifies correctly."""
    classifier = Classifier(file.read_bytes(), file.name)
    batches = np.array_split(images, len(images) // 64 + 1)
    return np.concatenate([classifier.logits(batch).argmax(1) for batch in batches]) == labels


def quantize_naively(fp32: Path, train: Any, options: Options, file: Path) -> Path:
    """Quantize with the defaults of ONNX Runtime's static quantization."""
    (images,) = read_calibration_images(fp32, train, options)
    with quiet():
        quantize_static(str(fp32), str(file), Chunks(images))
    return file


def read_calibration_images(fp32: Path, train: Any, options: Options) -> list[np.ndarray]:
    """Return images of the train role, all in one batch."""
    classifier = Classifier(fp32.read_bytes(), fp32.name)
    # A key is the hash of an image: the first of them are any images.
    drawn = sorted(train, key=lambda image: str(image.key))[: options.calibration_images]
    return [read(drawn, classifier)]


def quantize_learned(run: Path, fp32: Path, images: np.ndarray, file: Path) -> Path:
    """Write the candidate of quantization-aware training, whether it ships or not."""
    prepared = prepare(fp32)
    name, graph = load_graph(run, prepared)
    ranges, _ = calibrate_ranges(graph.prepared.model, [images], "minmax", prepared.scope.op_types)
    model = quantize(graph.prepared, ranges, find_target(name), overrides=graph.overrides)
    return write_int8(graph.prepared, model, file, {}).path


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    lines = [
        "| run | file | top-1, % | points lost | wrong only here / only in fp32 | McNemar's p | how |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compared = (
            f"{row['lost']:+.2f} | {row['worse']} / {row['better']} | {row['p']:.2g} | {row['how']}"
            if "lost" in row
            else "– | – | – | –"
        )
        lines.append(
            f"| {row['run']} ({row['n']:,} images) | {row['file']} | {row['top1']:.2f} | {compared} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
