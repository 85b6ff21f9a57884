"""Command line of `predict.py`, also used by `compress predict`.

It ships with every artifact, see `artifact.RUNTIME`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .device.bench import SECONDS, format_bench, run_bench, write_bench
from .device.self_test import run_self_test
from .runtime import (
    CPU,
    MAX_THREADS,
    ArtifactError,
    Classifier,
    Detection,
    Detector,
    ImageError,
    Pixels,
    Prediction,
    decode_image,
    open_model,
    readable_formats,
)
from .text import encodable_json, escape_controls, escape_json

TOP, MIN_SCORE = 3, 0.5
"""Defaults of `--top` and `--min-score`."""


def explain_unsuited(
    model: Classifier | Detector,
    images: Sequence[Path],
    top: int | None,
    min_score: float | None,
    draw: Path | None,
) -> str | None:
    """Return why an option, None unless it is set, does not apply to the model or images; None if all do."""
    if isinstance(model, Detector):
        if top is not None:
            return f"--top requires a classifier, {model.name} is a detector"
    else:
        for option, value in (("--min-score", min_score), ("--draw", draw)):
            if value is not None:
                return f"{option} requires a detector, {model.name} is a classifier"
    if draw is not None and (len(images) > 1 or images[0].is_dir()):
        return "--draw requires one image file"
    return None


def print_predictions(
    model: Classifier | Detector,
    paths: Iterable[Path],
    *,
    top: int = TOP,
    min_score: float = MIN_SCORE,
    as_json: bool = False,
) -> int:
    """Print one line per image file, including those in folders; print errors to stderr.

    A classifier's line has its `top` labels. A detector has a line per object of at least `min_score`, or in
    JSON one per image. Returns the number of images that could not be read.
    """
    failures = 0
    for path in paths:
        try:
            files = _find_images(path) if path.is_dir() else [path]
        except ImageError as error:
            failures += 1
            _print_error(error)
            continue
        for file in files:
            try:
                if isinstance(model, Detector):
                    [detections] = model.detect([file], min_score)
                    text = _format_detections(file, detections, as_json=as_json)
                else:
                    [prediction] = model.predict([file], top)
                    has_thresholds = model.thresholds is not None
                    text = _format(file, prediction, as_json=as_json, multi_label=has_thresholds)
            except ImageError as error:
                failures += 1
                _print_error(error)
            else:
                print(text)
    return failures


def _print_error(error: Exception | str) -> None:
    print(escape_controls(f"Error: {error}"), file=sys.stderr)


def _find_images(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted. Raises ImageError if there are none."""
    suffixes = readable_formats()
    try:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    except OSError as error:
        raise ImageError(f"cannot read {folder}: {error.strerror}") from error
    if not files:
        raise ImageError(f"{folder} contains no images")
    return files


def _format(path: Path, prediction: Prediction, *, as_json: bool, multi_label: bool) -> str:
    """Return the most likely labels; for a multi-label model the predicted ones, in JSON both."""
    name = _name(path)
    if as_json:
        labels = {"labels": _to_json(prediction.labels)} if multi_label else {}
        return _json_line({"image": name, **labels, "top": _to_json(prediction.top)})
    shown = prediction.labels if multi_label else prediction.top
    text = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in shown)
    return escape_controls(f"{name}: {text or 'no label'}")


def _format_detections(path: Path, detections: Sequence[Detection], *, as_json: bool) -> str:
    """Return label, score and box in pixels of each object."""
    name = _name(path)
    if as_json:
        return _json_line({"image": name, "detections": [detection._asdict() for detection in detections]})
    lines = [
        f"{name}: {label} {100 * score:.1f} % at {', '.join(f'{side:.0f}' for side in box)}"
        for label, score, box in detections
    ]
    return "\n".join(map(escape_controls, lines or [f"{name}: no objects"]))


def _name(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _json_line(line: dict[str, Any]) -> str:
    text = escape_json(json.dumps(line, ensure_ascii=False))
    return encodable_json(text, getattr(sys.stdout, "encoding", None))


def _to_json(labels: Iterable[tuple[str, float]]) -> list[dict[str, str | float]]:
    return [{"label": label, "probability": probability} for label, probability in labels]


_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#000075")


def draw_boxes(
    pixels: Pixels, boxes: Iterable[tuple[int, str, tuple[float, float, float, float]]]
) -> Image.Image:
    """Draw boxes on a copy of an image: class index, text, and x1, y1, x2, y2 in pixels of each."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    width = max(1, round(max(picture.size) / 320))
    draw = ImageDraw.Draw(picture)
    scalable = hasattr(ImageFont, "load_default_imagefont")  # Pillow 10.1 and later
    font = ImageFont.load_default(*([max(10, max(picture.size) // 48)] if scalable else []))
    for index, text, box in boxes:
        color = _COLORS[index % len(_COLORS)]
        draw.rectangle(box, outline=color, width=width)
        left, top, right, bottom = font.getbbox(text)
        left, top, right, bottom = left + box[0], top + box[1], right + box[0], bottom + box[1]
        shift = min(bottom - box[1], box[1])  # above the box if there is room
        draw.rectangle((left, top - shift, right, bottom - shift), fill=color)
        draw.text((box[0], box[1] - shift), text, fill="white", font=font)
    return picture


def draw_detections(model: Detector, image: Path, file: Path, min_score: float) -> None:
    """Write an image with the boxes of its objects. Raises ImageError if it cannot be read or written."""
    pixels = decode_image(image, gray_bits=model.preprocessing.gray_bits)
    [detections] = model.detect([image], min_score)
    boxes = [(model.labels.index(d.label), f"{d.label} {100 * d.score:.0f} %", d.box) for d in detections]
    try:
        if file.exists() and file.samefile(image):
            raise ValueError("it is the image itself")
        draw_boxes(pixels, boxes).save(file)
    except (OSError, ValueError) as error:  # ValueError: a suffix of no format that Pillow writes
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot write {_name(file)}: {reason}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, escape_controls(f"Error: {message}. See --help.") + "\n")


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _thread_count(text: str) -> int:
    count = _positive_integer(text)
    if count > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_THREADS}, got {text}")
    return count


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def _explain_conflict(options: argparse.Namespace) -> str | None:
    """Return why the options cannot be used together; None if they can."""
    if options.self_test and options.bench:
        return "--self-test and --bench cannot be used together"
    if options.self_test and options.images:
        return "--self-test takes no images"
    if not (options.self_test or options.bench or options.images):
        return "an image or folder is required"
    for name, value in (("--seconds", options.seconds), ("--out", options.out)):
        if value is not None and not options.bench:
            return f"{name} requires --bench"
    return None


def _bench(options: argparse.Namespace) -> None:
    """Run the bench and print its table. Raises ArtifactError and ImageError."""
    bench = run_bench(
        options.artifact,
        file=options.file,
        threads=options.threads,
        provider=options.provider,
        images=[
            file for path in options.images for file in (_find_images(path) if path.is_dir() else [path])
        ],
        seconds=options.seconds or SECONDS,
    )
    path = write_bench(bench, options.out or Path())
    print(escape_controls(format_bench(bench), keep="\n"))
    print(f"Written to {_name(path)}")


def main(arguments: Sequence[str] | None = None, folder: Path = Path()) -> int:
    """Run the command; return 1 if an image or the model cannot be read, otherwise 0.

    `folder` is the default of `--artifact`.
    """
    parser = _Parser(description="Apply the model of an artifact folder to images.")
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image file or folder")
    parser.add_argument("--top", type=_positive_integer, help=f"number of labels per image [default: {TOP}]")
    parser.add_argument(
        "--min-score", type=_fraction, help=f"smallest score of a detected object [default: {MIN_SCORE}]"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write the image with its objects' boxes")
    parser.add_argument(
        "--self-test", action="store_true", help="compare this machine's outputs with those at export"
    )
    parser.add_argument(
        "--bench", action="store_true", help="time the model files, from synthetic photos or these images"
    )
    parser.add_argument(
        "--seconds", type=_positive_number, help=f"for each file and thread count [default: {SECONDS:g}]"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of bench.DEVICE.json [default: the current folder]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--file", help="model file in the folder [default: the faster one]")
    parser.add_argument(
        "--threads", type=_thread_count, help="number of threads [default: allowed cores, at most 4]"
    )
    parser.add_argument(
        "--provider", default=CPU, metavar="NAME", help=f"onnxruntime's execution provider [default: {CPU}]"
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        default=folder,
        help="artifact folder [default: the folder of predict.py]",
    )
    options = parser.parse_args(arguments)
    if (reason := _explain_conflict(options)) is not None:
        parser.error(reason)
    try:
        if options.self_test:
            cause = run_self_test(options.artifact, options.threads, options.provider)
            if cause is not None:
                _print_error(f"this machine's outputs differ from those at export: {cause}")
            return int(cause is not None)
        if options.bench:
            _bench(options)
            return 0
        model = open_model(
            options.artifact, file=options.file, threads=options.threads, providers=options.provider
        )
        top, min_score, draw = options.top, options.min_score, options.draw
        if (reason := explain_unsuited(model, options.images, top, min_score, draw)) is not None:
            parser.error(reason)
        top, min_score = top or TOP, MIN_SCORE if min_score is None else min_score
        failures = print_predictions(
            model, options.images, top=top, min_score=min_score, as_json=options.json
        )
        if isinstance(model, Detector) and draw is not None and not failures:
            draw_detections(model, options.images[0], draw, min_score)
        return int(failures > 0)
    except (ArtifactError, ImageError) as error:
        _print_error(error)
        return 1


def run(folder: Path) -> NoReturn:
    """Run `main` as a program of an artifact folder."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # they may be closed
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main(folder=folder)
        for stream in streams:
            stream.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # stdout is on a full disk, or its reader has exited
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _print_error(f"cannot write the output: {error.strerror}")
        code = 1
    sys.exit(code)
