"""Command line of `predict.py`, also used by `compress predict`.

`artifact.py` appends this file to `runtime.py` and `text.py`; it must not import anything else of questpress.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from .runtime import MAX_THREADS, ArtifactError, Classifier, ImageError, Prediction, readable_formats
from .text import encodable_json, escape_controls, escape_json


def print_predictions(
    classifier: Classifier, paths: Iterable[Path], *, top: int = 3, as_json: bool = False
) -> int:
    """Print one line per image file, including those in folders; print errors to stderr.

    Returns the number of images that could not be read.
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
                [prediction] = classifier.predict([file], top)
            except ImageError as error:
                failures += 1
                _print_error(error)
            else:
                print(
                    _format(file, prediction, as_json=as_json, multi_label=classifier.thresholds is not None)
                )
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
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    if as_json:
        labels = {"labels": _to_json(prediction.labels)} if multi_label else {}
        line = {"image": name, **labels, "top": _to_json(prediction.top)}
        text = escape_json(json.dumps(line, ensure_ascii=False))
        return encodable_json(text, getattr(sys.stdout, "encoding", None))
    shown = prediction.labels if multi_label else prediction.top
    text = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in shown)
    return escape_controls(f"{name}: {text or 'no label'}")


def _to_json(labels: Iterable[tuple[str, float]]) -> list[dict[str, str | float]]:
    return [{"label": label, "probability": probability} for label, probability in labels]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if an image or the model cannot be read, otherwise 0."""
    parser = _Parser(description="Classify images with the model of an artifact folder.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file or folder")
    parser.add_argument(
        "--top", type=_positive_integer, default=3, help="number of labels per image [default: 3]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--file", help="model file in the folder [default: int8 for this processor]")
    parser.add_argument(
        "--threads", type=_thread_count, help="number of threads [default: allowed cores, at most 4]"
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="artifact folder [default: the folder of this file]",
    )
    options = parser.parse_args(arguments)
    try:
        classifier = Classifier.load(options.artifact, file=options.file, threads=options.threads)
        return int(print_predictions(classifier, options.images, top=options.top, as_json=options.json) > 0)
    except ArtifactError as error:
        _print_error(error)
        return 1


def run() -> NoReturn:
    """Run `main` as a program."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # they may be closed
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main()
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
