"""The networks a run has trained, as they lie in its folder."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..models.build import build
from ..models.checkpoint import load_saved
from ..models.weights import load_into
from .device import Engine
from .job import Job
from .task import Teacher

STUDENT = "student.safetensors"


def weights_metadata(job: Job, name: str) -> dict[str, str]:
    """What a weights file says of itself: with it, the file can be another run's ``--teacher-weights``."""
    return {
        "architecture": name,
        "labels": json.dumps(list(job.data.classes), ensure_ascii=False),
        "key": job.key,
    }


def weights_hash(file: Path) -> str:
    """SHA-256 of a weights file's tensors, whatever else the file says of itself: equal weights are one
    teacher, also where runs with other options have saved them.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def student_network(job: Job) -> nn.Module:
    """The finished student, on the CPU, in eval mode."""
    network = build(job.student, num_classes=len(job.data.classes), image_size=job.image_size)
    load_into(network, load_saved(job.folder.path / STUDENT))
    return network.eval()


def teacher_network(job: Job, t: int) -> nn.Module:
    """A finished teacher, on the CPU, in eval mode."""
    network = build(job.teachers[t], num_classes=len(job.data.classes), image_size=job.image_size)
    load_into(network, load_saved(job.folder.path / job.teacher_file(t)))
    return network.eval()


def load_teacher(job: Job, t: int, engine: Engine) -> Teacher:
    """A finished teacher, frozen, on the run's device."""
    return Teacher(teacher_network(job, t), job.geometry(job.teachers[t]), engine).to(job.device)
