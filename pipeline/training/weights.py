"""Whether the weights that a job starts from can be had and fit: asked before hours of work, not after."""

import json
from collections.abc import Collection

from torch import nn

from ...models.build import build
from ...models.checkpoint import load_saved, tensors_digest
from ...models.initialize import start
from ...models.pretrained import check_published, has_pretrained
from ...models.weights import load_into
from ..config.options import Options
from ..data.dataset import ImageSet
from ..runs.device import Engine
from .job import Job, NetworkSpec
from .task import Teacher


def weights_metadata(job: Job, member: NetworkSpec, licence: str | None) -> dict[str, str]:
    """What a weights file says of itself: with it, the file can be another run's ``--teacher-weights``."""
    return {
        "architecture": member.name,
        # A network without a head knows no classes.
        **({"labels": json.dumps(list(job.data.classes), ensure_ascii=False)} if member.classes else {}),
        "key": job.key,
        **({} if member.activation is None else {"activation": member.activation}),
        # What was made from weights under a licence stays under it.
        **({} if licence is None else {"licence": licence}),
    }


def trained_network(job: Job, member: NetworkSpec) -> nn.Module:
    """A finished network, on the CPU, in eval mode."""
    network = build(
        member.name,
        num_classes=member.classes,
        image_size=member.image_size,
        activation=member.activation,
    )
    load_into(network, load_saved(job.folder.path / member.file))
    return network.eval()


def weights_digest(job: Job, member: NetworkSpec) -> str:
    """What tells a finished network's weights from any others, in whichever run they came to be."""
    return tensors_digest(job.folder.path / member.file)


def load_teacher(job: Job, teacher: NetworkSpec, engine: Engine) -> Teacher:
    """A finished network as a teacher, frozen, on the run's device."""
    return Teacher(trained_network(job, teacher), job.geometry(teacher), engine).to(job.device)


def check_weights(options: Options, data: ImageSet, stages: Collection[str], *, download: bool) -> None:
    """Load the weights files that these stages will load, ask for the published ones, and put these into the
    cache if ``download``.

    Raises:
        ModelError: a file's weights cannot be read or do not fit; or published ones cannot be had: all of
            them are named, with the options that do without.
    """
    published: list[tuple[str, str]] = []
    size = options.image_size
    if "teacher" in stages:
        teachers = zip(options.teacher, options.teacher_weights, options.teacher_head, strict=True)
        for number, (name, source, head) in enumerate(teachers):
            if source == "auto":
                published.append((name, "--teacher-weights"))
            elif source != "none":
                _try_file(name, source, head, data, size, options.seed + number, "teacher", None)
    if "student" in stages:
        name, source = options.student, options.student_weights
        # A student without published weights starts from scratch.
        if source == "auto" and has_pretrained(name):
            published.append((name, "--student-weights"))
        elif source not in ("auto", "none"):
            size = options.student_size or size
            _try_file(name, source, "auto", data, size, options.seed, "student", options.activation)
    check_published(published, download=download)


def _try_file(
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
    start(name, source, head, data.classes, image_size, seed, _told_later, role, activation)


def _told_later(_note: str) -> None:
    """The stage that loads the weights says the same again."""
