"""The command that an artifact's predict.py is: ask a network about image files; `compress predict` asks by
it too. `standalone.py` puts it behind the runtime and plain_text.py, so that it knows nothing else of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image

from .runtime import _FORMATS, MOST_THREADS, ArtifactError, Classifier, ImageError, Prediction
from .text import json_spelled_out, spelled_out


def ask(classifier: Classifier, paths: Iterable[Path], *, top: int = 3, as_json: bool = False) -> int:
    """Print a line of answers for each image file, and for each image below a folder; errors go to stderr.

    Returns how many could not be read.
    """
    unread = 0
    for path in paths:
        try:
            found = _images_below(path) if path.is_dir() else [path]
        except ImageError as error:
            unread += 1
            _tell(error)
            continue
        for file in found:
            try:
                [answer] = classifier.predict([file], top)
            except ImageError as error:
                unread += 1
                _tell(error)
            else:
                print(_line(file, answer, as_json=as_json, several=classifier.thresholds is not None))
    return unread


def _tell(error: Exception | str) -> None:
    print(spelled_out(f"Error: {error}"), file=sys.stderr)


def _images_below(folder: Path) -> list[Path]:
    """By name. Raises ImageError where there are none, or the folder cannot be read."""
    formats = {suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS}
    try:
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in formats)
    except OSError as error:
        raise ImageError(f"cannot read {folder}: {error.strerror}") from error
    if not found:
        raise ImageError(f"{folder} holds no image")
    return found


def _line(path: Path, answer: Prediction, *, as_json: bool, several: bool) -> str:
    """The likeliest labels; where an image may have `several`, those it has, and in JSON the others too."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    if as_json:
        has = {"labels": _named(answer.labels)} if several else {}
        said = {"image": name, **has, "answers": _named(answer.top)}
        return json_spelled_out(json.dumps(said, ensure_ascii=False))
    shown = answer.labels if several else answer.top
    told = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in shown)
    return spelled_out(f"{name}: {told or 'none of the labels'}")


def _named(answers: Iterable[tuple[str, float]]) -> list[dict[str, str | float]]:
    return [{"label": label, "probability": probability} for label, probability in answers]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, spelled_out(f"Error: {message}; --help lists the options.") + "\n")


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _threads(text: str) -> int:
    count = _whole_number(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} threads are more than {MOST_THREADS}")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """`python predict.py IMAGE…`: 0, 1 where something cannot be read; 2 is the exit of a wrong option."""
    parser = _Parser(description="Ask the network of an artifact folder what it sees.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a file, or a folder of them")
    parser.add_argument("--top", type=_whole_number, default=3, help="answers for each image [default: 3]")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--file", help="which .onnx of the folder answers [default: int8 for this processor]")
    parser.add_argument("--threads", type=_threads, help="[default: the cores allowed, at most 4]")
    parser.add_argument(
        "--artifact",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder with the manifest.json [default: the one this file lies in]",
    )
    asked = parser.parse_args(arguments)
    try:
        classifier = Classifier.load(asked.artifact, file=asked.file, threads=asked.threads)
        return 1 if ask(classifier, asked.images, top=asked.top, as_json=asked.json) else 0
    except ArtifactError as error:
        _tell(error)
        return 1


def run() -> NoReturn:
    """`main` as a program of its own."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # they may be closed
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main()
        for stream in streams:
            stream.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # the disk behind the answers is full, or whoever read them has gone
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _tell(f"the answers cannot be written: {error.strerror}")
        code = 1
    sys.exit(code)
