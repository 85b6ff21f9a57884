"""The task in which a student learns: its methods, its teachers or the store of their answers."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...models.projection import Widened, widen
from ...models.readout import Readouts
from .. import methods
from ..methods.base import Method, Setup
from ..runs.device import Engine, inference_engine
from ..tasks import task_of
from .job import Job
from .quantized import QuantizedReadouts
from .task import DistillationTask, Teacher
from .teacher_cache import Store, store_of
from .trainer import engine
from .weights import load_teacher

TEACHERS = "student's teachers"
"""Under which the run folder keeps the engine that the teachers answer with."""


def width_of(job: Job) -> int | None:
    """To which width a method has the student's vector brought while it learns; None: it stays as it is."""
    names = methods.parse_methods(job.options.method)
    if not names:
        return None
    parameters = methods.parse_parameters(names, job.options.settings)
    setup = Setup(job.shapes(job.student), [job.shapes(teacher) for teacher in job.current_teachers])
    asked = (methods.load(name).student_width(parameters[name], setup) for name in names)
    return next((width for width in asked if width is not None), None)


def methods_of(job: Job) -> dict[str, Method]:
    """The run's methods by name, made from what ``prepare`` has left."""
    o = job.options
    names = methods.parse_methods(o.method)
    parameters = methods.parse_parameters(names, o.settings)
    classes = {name: methods.load(name) for name in names}
    width = width_of(job)
    student = job.shapes(job.student) if width is None else replace(job.shapes(job.student), vector=width)
    teachers = [job.shapes(teacher) for teacher in job.current_teachers] if names else []
    prepared = load_file(job.folder.path / job.prepared) if any(c.prepares for c in classes.values()) else {}
    made: dict[str, Method] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        for name in names:
            own = {
                key[len(name) + 1 :]: value for key, value in prepared.items() if key.startswith(f"{name}.")
            }
            made[name] = classes[name](parameters[name], Setup(student, teachers, own))
    return made


def reads_of(job: Job) -> frozenset[str]:
    """What the methods look at in the student."""
    return _union(method.reads_of_student for method in methods_of(job).values())


def student_task(
    job: Job, network: nn.Module, chosen: Engine, *, normalise: nn.Module | None = None
) -> tuple[DistillationTask, Store | None]:
    """What is trained and, unless the teachers are asked at every step, the store of their answers.

    Args:
        network: the student, or the readouts of a fake-quantized one, which goes on where the student ended
            and is not averaged.
        normalise: what brings pixels to it, where that is not the student's mean and deviation.
    """
    o = job.options
    heads = methods_of(job)
    width = width_of(job)
    goes_on = isinstance(network, QuantizedReadouts)
    if width is not None and not goes_on:
        Readouts(network).check_widening()  # with numbers: the shapes alone were looked at before
        widen(network, width, job.seed)
    asked: list[Teacher] = []
    store = None
    if heads:
        answering = engine(job, TEACHERS, lambda asked: inference_engine(job.device, asked))
        if o.cache_views:
            store = store_of(job, heads, answering)
        else:
            asked = [load_teacher(job, teacher, answering) for teacher in job.current_teachers]
    task = DistillationTask(
        network,
        job.geometry(job.student),
        chosen,
        label_task=task_of(job.data),
        label_smoothing=o.label_smoothing or 0.0,
        teachers=asked,
        teacher_reads=[
            _union(method.reads_of_teachers[t] for method in heads.values()) for t in range(len(asked))
        ],
        methods=heads,
        student_reads=_union(method.reads_of_student for method in heads.values()),
        weights=weights_of_losses(o.weight, {name: type(method) for name, method in heads.items()}),
        balance=o.balance == "auto",
        ema=None if goes_on else o.ema,
        average_last=None if goes_on else o.average_last,
        ranks=job.ranks,
        normalise=normalise,
        epochs_before=(o.epochs or 0) if goes_on else 0,
    )
    return task, store


def _union(reads: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*reads)


def weights_of_losses(given: dict[str, float], classes: dict[str, type[Method]]) -> dict[str, float]:
    """Cross-entropy has the paper's weight where a method stands alone, and 1 in a sum."""
    alone = next(iter(classes.values())).cross_entropy if len(classes) == 1 else 1.0
    return {"ce": alone, **given}


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
