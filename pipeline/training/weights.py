"""Weights files: those that a run writes and reads, and those that it starts from."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from ...models.build import build
from ...models.checkpoint import read_checkpoint
from ...models.initialize import initialize
from ...models.pretrained import check_published, has_pretrained
from ...models.weights import load_into
from ..config.network import NetworkSpec
from ..config.options import Options
from ..data.dataset import ImageSet
from ..runs.device import Engine
from .task import Teacher


def weights_metadata(
    spec: NetworkSpec, classes: Sequence[str], key: str, license: str | None
) -> dict[str, str]:
    """Return the metadata with which a weights file can be another run's ``--teacher-weights``.

    ``license`` is that of the weights from which training started; it applies to the trained ones too.
    """
    return {
        "architecture": spec.name,
        **({"labels": json.dumps(list(classes), ensure_ascii=False)} if spec.classes else {}),
        "key": key,
        **({} if spec.activation is None else {"activation": spec.activation}),
        **({} if license is None else {"license": license}),
    }


def load_network(run: Path, spec: NetworkSpec) -> nn.Module:
    """Load a trained network of a run, on the CPU, in eval mode."""
    network = build(
        spec.name, num_classes=spec.classes, image_size=spec.image_size, activation=spec.activation
    )
    load_into(network, read_checkpoint(run / spec.file))
    return network.eval()


def load_teacher(run: Path, spec: NetworkSpec, engine: Engine) -> Teacher:
    """Load a trained network of a run as a frozen teacher, on the engine's device."""
    return Teacher(load_network(run, spec), spec.geometry, engine).to(engine.device)


def check_weights(options: Options, data: ImageSet, stages: Collection[str], *, download: bool) -> None:
    """Check the weights from which these stages start, before hours of work and not after.

    Files are loaded; published weights are looked up, and downloaded into the cache if ``download``.

    Raises:
        ModelError: weights cannot be read, do not fit or cannot be downloaded.
    """
    published: list[tuple[str, str]] = []
    size = options.image_size
    if "teacher" in stages:
        teachers = zip(options.teacher, options.teacher_weights, options.teacher_head, strict=True)
        for number, (name, source, head) in enumerate(teachers):
            if source == "auto":
                published.append((name, "--teacher-weights"))
            elif source != "none":
                _check_file(name, source, head, data, size, options.seed + number, "teacher", None)
    if "student" in stages:
        name, source = options.student, options.student_weights
        # A student without published weights starts from scratch.
        if source == "auto" and has_pretrained(name):
            published.append((name, "--student-weights"))
        elif source not in ("auto", "none"):
            size = options.student_size or size
            _check_file(name, source, "auto", data, size, options.seed, "student", options.activation)
    check_published(published, download=download)


def _check_file(
    name: str,
    source: str,
    head: str,
    data: ImageSet,
    image_size: int | None,
    seed: int,
    role: str,
    activation: str | None,
) -> None:
    assert image_size is not None
    # The stage that loads the weights repeats the notes.
    initialize(name, source, head, data.classes, image_size, seed, lambda _note: None, role, activation)
