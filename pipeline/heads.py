"""What a student has learned with and ships without: the methods' heads and the factors of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.projection import Widened
from .training.task import DistillationTask

_EMBED = "embed"


def save_heads(task: DistillationTask, path: Path) -> None:
    """Write them as safetensors, each under its part's name."""
    parts: dict[str, Mapping[str, Any]] = dict(task.get_task_state())
    classifier = _classifier(task.network)
    if isinstance(classifier, Widened):
        parts[_EMBED] = classifier.embed.state_dict()
    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, state in parts.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path)


def load_heads(task: DistillationTask, path: Path) -> None:
    """Put them into a task of the same methods."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    known = task.get_task_state()
    # What else a head keeps, such as the sums of an epoch that is over, begins anew.
    task.load_task_state({part: {**known[part], **parts.get(part, {})} for part in known})


def load_embed(path: Path) -> nn.Linear | None:
    """The linear layer that brought the student's vector to another width; None where there was none."""
    state = {
        key.partition("/")[2]: value for key, value in load_file(path).items() if key.startswith(f"{_EMBED}/")
    }
    if not state:
        return None
    width, features = state["weight"].shape
    layer = torch.nn.utils.skip_init(nn.Linear, features, width, bias="bias" in state)
    layer.load_state_dict(state)
    return layer


def _classifier(network: nn.Module) -> Any:
    get = getattr(network, "get_classifier", None)
    return get() if callable(get) else None
