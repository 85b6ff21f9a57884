"""Classifiers and detectors: from images to labels and boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort
from PIL import Image

from .decode import (
    ImageSource,
    check_source,
    convert_image,
    decode_image,
    list_images,
    original_size,
)
from .errors import ArtifactError
from .manifest import Description, choose_file, read_file, read_manifest, read_metadata, read_verified
from .outputs import Decoder, sigmoid, softmax
from .preprocessing import Pixels, Preprocessing, needed_size, normalize, render, to_original
from .processor import check_threads
from .session import CPU, open_checked

if TYPE_CHECKING:
    from typing import Self


class Model:
    """A model file with its preprocessing and labels: a `Classifier` or a `Detector`."""

    thresholds: np.ndarray | None = None
    """For a multi-label classifier: the smallest probability at which each label is predicted, [labels]."""
    decoder: Decoder | None = None
    """For a detector."""

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Open the content of an ONNX file; `load` reads it from a folder or file.

        `preprocessing` and `labels` are by default those of the model's metadata. Raises ArtifactError if the
        model does not take images, or if the metadata is required and missing.
        """
        self.name = name
        self.threads = check_threads(threads)
        if isinstance(model, bytes):
            model = open_checked(model, name, self.threads, providers)
        self.session = model
        self._complete = bool(preprocessing and labels)
        """True if the metadata of the file is not required."""
        self._own = read_metadata(self.session, name, required=not self._complete)
        self.preprocessing: Preprocessing = preprocessing or self._own.preprocessing  # type: ignore[union-attr]
        self.labels: tuple[str, ...] = tuple(labels or self._own.labels)  # type: ignore[union-attr]
        inputs = self.session.get_inputs()
        if (
            len(inputs) != 1
            or not self.session.get_outputs()
            or inputs[0].type not in ("tensor(uint8)", "tensor(float)")
        ):
            types = ", ".join(entry.type for entry in inputs) or "no input"
            raise ArtifactError(f"{name} is not an image model: it takes {types}")
        self._input = inputs[0].name
        batch = inputs[0].shape[0] if inputs[0].shape else None
        self._batch: int | None = batch if isinstance(batch, int) and batch > 0 else None
        self.takes_pixels: bool = inputs[0].type == "tensor(uint8)"

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        file: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
        providers: str | Sequence[str] = CPU,
    ) -> Self:
        """Load a model as `open_model` does. Raises ArtifactError, also if it is of the other class."""
        model = open_model(path, file=file, threads=threads, precision=precision, providers=providers)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise ArtifactError(f"{model.name} is a {kind.lower()}, use {kind}")
        return model

    def decode(self, image: ImageSource) -> Pixels:
        """Decode an image as this model requires it. Raises ImageError, and as `check_source`."""
        p, image = self.preprocessing, check_source(image)
        if isinstance(image, np.ndarray):
            return image
        if isinstance(image, Image.Image):
            return convert_image(image, gray_bits=p.gray_bits)
        return decode_image(image, gray_bits=p.gray_bits, needed=partial(needed_size, p=p))

    def to_input(self, pixels: np.ndarray) -> np.ndarray:
        """Convert rendered images, uint8 [B, H, W, 3], to the model's input: normalize unless it does."""
        return pixels if self.takes_pixels else normalize(pixels, self.preprocessing)

    def infer(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input`: `Classifier.logits` or `Detector.detections`."""
        raise NotImplementedError

    def predict_logits(self, pixels: np.ndarray) -> np.ndarray:
        """Convert rendered images, uint8 [B, H, W, 3], to what `infer` returns.

        Raises ArtifactError if the largest logit of an image is not finite.
        """
        logits = self.infer(self.to_input(pixels))
        if not np.isfinite(logits.max(axis=-1)).all():
            raise ArtifactError(f"{self.name} returns logits that are not finite")
        return logits

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Convert the logits that `infer` returns to probabilities; those of detections are some already."""
        return outputs

    def run(self, batch: np.ndarray, names: list[str] | None = None) -> list[np.ndarray]:
        """Return the model's outputs of these names, by default all, for at least one image of `to_input`.

        A model of a fixed batch size is run several times.
        """
        if self.takes_pixels and batch.dtype != np.uint8:
            raise ValueError(f"{self.name} takes pixels, uint8 [B, H, W, 3], got {batch.dtype}")
        batch = np.ascontiguousarray(batch, dtype=np.uint8 if self.takes_pixels else np.float32)
        size = self._batch or len(batch)
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]
        try:
            outputs = [self.session.run(names, {self._input: chunk}) for chunk in chunks]
        except Exception as error:  # onnxruntime's exceptions have no common public class
            reason = " ".join(str(error).split())
            raise ArtifactError(f"onnxruntime cannot run {self.name}: {reason}") from error
        return outputs[0] if len(outputs) == 1 else [np.concatenate(parts) for parts in zip(*outputs)]

    def _render(
        self, images: ImageSource | Iterable[ImageSource], batch_size: int
    ) -> Iterator[tuple[list[ImageSource], list[Pixels], np.ndarray]]:
        """Yield up to `batch_size` images at a time, their decoded pixels, and what is rendered of them."""
        remaining = iter(list_images(images))
        while chunk := list(islice(remaining, batch_size)):
            decoded = [self.decode(image) for image in chunk]
            yield chunk, decoded, np.stack([render(image, self.preprocessing) for image in decoded])


@dataclass(frozen=True)
class Prediction:
    """The result for one image: the most likely label, its probability, and the `top` most likely labels.

    `labels` are the predicted labels with their probabilities: the most likely one. For a multi-label model,
    they are those whose probability reaches their threshold, the most likely first; there may be none.
    """

    label: str
    probability: float
    top: list[tuple[str, float]]
    labels: list[tuple[str, float]]


class Classifier(Model):
    """A model that maps images to labels and probabilities."""

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        """Open a model as `Model` does; `thresholds`, one per label, make it a multi-label model.

        Raises ArtifactError, also if it is not an image classifier.
        """
        super().__init__(
            model, name, threads=threads, providers=providers, preprocessing=preprocessing, labels=labels
        )
        if self._own is not None:
            if self._own.decoder is not None:
                raise ArtifactError(f"{name} is a detector, use Detector")
            if not self._complete and thresholds is None:
                thresholds = self._own.thresholds
        outputs = self.session.get_outputs()
        classes = outputs[0].shape[-1] if outputs[0].shape else None
        if isinstance(classes, int) and classes != len(self.labels):
            raise ArtifactError(f"{name} has {classes} outputs but {len(self.labels)} labels")
        self.thresholds = None if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        if self.thresholds is not None and self.thresholds.shape != (len(self.labels),):
            raise ArtifactError(f"{name} has {self.thresholds.size} thresholds but {len(self.labels)} labels")

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input`; return float32 [B, classes].

        Raises ValueError if `batch` is of the wrong type, ArtifactError if onnxruntime fails or the output
        has another shape.
        """
        if len(batch) == 0:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        logits = self.run(batch)[0]
        shape, expected = getattr(logits, "shape", None), (len(batch), len(self.labels))
        if shape != expected:
            raise ArtifactError(f"{self.name} must return logits of shape {expected}, got {shape}")
        if logits.dtype.kind not in "fiu":
            raise ArtifactError(f"{self.name} must return numbers, got {logits.dtype}")
        return logits

    infer = logits

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return float64 [B, classes]: softmax, or for a multi-label model sigmoid."""
        return softmax(logits) if self.thresholds is None else sigmoid(logits)

    def predict(
        self, images: ImageSource | Iterable[ImageSource], top: int = 5, *, batch_size: int = 16
    ) -> list[Prediction]:
        """Classify one or several images; see `ImageSource`. One image gives a list of one prediction.

        Raises ImageError if an image cannot be read, TypeError or ValueError for anything but images.
        """
        predictions = []
        for *_, pixels in self._render(images, batch_size):
            for row in self.probabilities(self.predict_logits(pixels)):
                order = np.argsort(-row, kind="stable")
                best = [(self.labels[index], float(row[index])) for index in order[: max(1, top)]]
                chosen = order[:1] if self.thresholds is None else order[(row >= self.thresholds)[order]]
                labels = [(self.labels[index], float(row[index])) for index in chosen]
                predictions.append(Prediction(*best[0], top=best, labels=labels))
        return predictions


class Detection(NamedTuple):
    """An object in an image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the decoded image."""


class Detector(Model):
    """A model that finds objects in images: labels, scores and boxes."""

    decoder: Decoder

    def __init__(
        self,
        model: bytes | ort.InferenceSession,
        name: str,
        *,
        threads: int | None = None,
        providers: str | Sequence[str] = CPU,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Open a model as `Model` does; `decoder` is by default that of its metadata.

        Raises ArtifactError, also if it is not a detector.
        """
        super().__init__(
            model, name, threads=threads, providers=providers, preprocessing=preprocessing, labels=labels
        )
        decoder = decoder or (None if self._own is None else self._own.decoder)
        shapes = {output.name: output.shape for output in self.session.get_outputs()}
        if decoder is None or not decoder.outputs(0).keys() <= shapes.keys():
            raise ArtifactError(f"{name} is not a detector")
        for output, columns in decoder.outputs(len(self.labels)).items():
            expected = (decoder.count, columns)
            sizes = zip(shapes[output][1:], expected)
            if len(shapes[output]) != 3 or any(isinstance(n, int) and n != m for n, m in sizes):
                raise ArtifactError(
                    f"{name} has {output} of shape {shapes[output]}, its decoder and labels require "
                    f"[batch, {decoder.count}, {columns}]"
                )
        self.decoder = decoder

    def detections(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on the result of `to_input` and decode; return float32 [B, detections, 6].

        Rows are score, class, x1, y1, x2, y2 by falling score, the box in fractions of the rendered image;
        unused rows are 0. Raises as `Classifier.logits`, also if outputs are not finite.
        """
        detections = np.zeros((len(batch), self.decoder.detections, 6), dtype=np.float32)
        if len(batch) == 0:
            return detections
        expected_columns = self.decoder.outputs(len(self.labels))
        outputs = self.run(batch, list(expected_columns))
        for output, columns in zip(outputs, expected_columns.values()):
            shape, expected = output.shape, (len(batch), self.decoder.count, columns)
            if shape != expected or output.dtype != np.float32:
                raise ArtifactError(f"{self.name} must return float32 of shape {expected}, got {shape}")
            if not np.isfinite(output).all():
                raise ArtifactError(f"{self.name} returns outputs that are not finite")
        for row, *image in zip(detections, *outputs):
            row[:] = self.decoder.decode(image, self.preprocessing.size)
        return detections

    infer = detections

    def detect(
        self,
        images: ImageSource | Iterable[ImageSource],
        min_score: float = 0.5,
        *,
        batch_size: int = 16,
    ) -> list[list[Detection]]:
        """Find objects in one or several images; see `ImageSource`.

        Returns for each image its objects of at least `min_score`, the best first. Raises as
        `Classifier.predict`.
        """
        return [
            self._locate(
                rows[rows[:, 0] >= max(min_score, self.decoder.score_threshold)],
                original_size(image, pixels),
            )
            for chunk, decoded, rendered in self._render(images, batch_size)
            for image, pixels, rows in zip(chunk, decoded, self.detections(self.to_input(rendered)))
        ]

    def _locate(self, rows: np.ndarray, size: tuple[int, int]) -> list[Detection]:
        boxes = to_original(rows[:, 2:], *size, self.preprocessing)
        return [
            Detection(self.labels[int(label)], float(score), (x1, y1, x2, y2))
            for (score, label), (x1, y1, x2, y2) in zip(rows[:, :2], boxes.tolist())
            if x1 < x2 and y1 < y2  # not in the padding alone
        ]


def open_model(
    path: str | Path,
    *,
    file: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
    providers: str | Sequence[str] = CPU,
) -> Classifier | Detector:
    """Load a model from a run folder, an artifact folder, or an .onnx file.

    In a folder, `file` is the name of the model file, by default the first of `precision` ('int8' or 'fp32')
    for this processor, see `manifest.choose_file`; its size and checksum are verified. `providers` are those
    of `open_session`. Raises ArtifactError.
    """
    path, count = Path(path), check_threads(threads)
    if path.is_file():
        return open_content(read_file(path), path.name, threads=count, providers=providers)
    folder, manifest = read_manifest(path)
    entry = choose_file(manifest["files"], folder, name=file, precision=precision, threads=count)
    content = read_verified(folder, entry)
    return open_content(content, entry["name"], threads=count, manifest=manifest, providers=providers)


def open_content(
    content: bytes,
    name: str,
    *,
    threads: int | None = None,
    manifest: Mapping[str, Any] | None = None,
    providers: str | Sequence[str] = CPU,
) -> Classifier | Detector:
    """Open the content of an ONNX file by its manifest, or its questpress metadata. Raises ArtifactError."""
    count = check_threads(threads)
    if manifest is None:
        session = open_checked(content, name, count, providers)
        own = read_metadata(session, name, required=True)
        is_detector = own is not None and own.decoder is not None
        return (Detector if is_detector else Classifier)(session, name, threads=count)
    about = Description.from_dict(manifest)
    shared: dict[str, Any] = {
        "threads": count,
        "providers": providers,
        "preprocessing": about.preprocessing,
        "labels": about.labels,
    }
    if about.decoder is not None:
        return Detector(content, name, **shared, decoder=about.decoder)
    return Classifier(content, name, **shared, thresholds=about.thresholds)
