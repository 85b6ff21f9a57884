"""The networks a run has trained, as they lie in its folder."""

import json

from torch import nn

from ..models.build import build
from ..models.checkpoint import load_saved, tensors_digest
from ..models.weights import load_into
from .runs.device import Engine
from .trainee import Teacher
from .training.job import Job, Member


def weights_metadata(job: Job, member: Member, licence: str | None) -> dict[str, str]:
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


def trained_network(job: Job, member: Member) -> nn.Module:
    """A finished network, on the CPU, in eval mode."""
    network = build(
        member.name,
        num_classes=member.classes,
        image_size=member.image_size,
        activation=member.activation,
    )
    load_into(network, load_saved(job.folder.path / member.file))
    return network.eval()


def weights_digest(job: Job, member: Member) -> str:
    """What tells a finished network's weights from any others, in whichever run they came to be."""
    return tensors_digest(job.folder.path / member.file)


def load_teacher(job: Job, tutor: Member, engine: Engine) -> Teacher:
    """A finished network as a teacher, frozen, on the run's device."""
    return Teacher(trained_network(job, tutor), job.geometry(tutor), engine).to(job.device)
