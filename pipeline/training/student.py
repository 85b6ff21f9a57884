"""The task that trains a student: its methods, and its teachers or their cached outputs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...export.conversion.pixel_input import Folded
from ...export.int8.fake_quantize import FakeQuantized
from ...models.checkpoint import tensors_digest
from ...models.pooling import average_cells
from ...models.readout import LOGITS, Readouts, Reads, Widened, widen
from .. import methods
from ..config.network import NetworkSpec
from ..config.options import Options
from ..data import augment
from ..data.training_data import TrainingData
from ..data.views import FIXED_SEED, ViewPolicy, ViewSchedule
from ..errors import JobError
from ..methods.base import Method, Parameters, Setup, Shapes, select
from ..methods.shapes import compute_shapes
from ..runs.device import Engine, inference_engine
from ..runs.files import DIGITS
from ..runs.hashes import digest
from .context import Round, RunContext
from .task import DistillationTask
from .teacher_cache import TeacherCache, TeacherSource
from .trainer import choose_run_engine
from .weights import load_teacher, starts_from_scratch

HEADS = "student.heads.safetensors"
"""The methods' heads in the run folder, for quantization-aware training."""

TEACHERS = "student's teachers"
"""Name of the teachers' engine in the run's record."""

MATCH_TOLERANCE = 1e-3
"""Largest difference of a tensor from a feature, as a fraction of the feature's norm."""

_PROJECTION = "embed"


def _shapes(spec: NetworkSpec) -> Shapes:
    return compute_shapes(spec.name, spec.classes, spec.image_size)


def method_setup(round_: Round) -> Setup:
    """Return the networks of a round as methods are built for them."""
    return Setup(_shapes(round_.student), [_shapes(teacher) for teacher in round_.teachers])


def student_width(options: Options, round_: Round) -> int | None:
    """Return the width to which a method projects the student's vector, or None."""
    setup, parameters = method_setup(round_), _method_parameters(options)
    widths = (methods.load(name).student_width(chosen, setup) for name, chosen in parameters.items())
    return next((width for width in widths if width is not None), None)


def _method_parameters(options: Options) -> dict[str, Parameters]:
    return methods.parse_parameters(methods.parse_methods(options.method), options.settings)


def build_methods(options: Options, round_: Round, run: Path) -> dict[str, Method]:
    """Build the run's methods by name, from the tensors that ``prepare`` has left in the run folder."""
    # The steps on the built-in digits are too few for the larger weight (docs/benchmarks.md).
    from_scratch = starts_from_scratch(options) and options.data != DIGITS
    setup = replace(method_setup(round_), from_scratch=from_scratch)
    parameters = _method_parameters(options)
    classes = {name: methods.load(name) for name in parameters}
    if (width := student_width(options, round_)) is not None:
        setup = replace(setup, student=replace(setup.student, vector=width))
    prepared = load_file(run / round_.prepared) if any(c.prepares for c in classes.values()) else {}
    built: dict[str, Method] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(round_.seed)
        for name, cls in classes.items():
            built[name] = cls(parameters[name], replace(setup, prepared=select(prepared, name)))
    return built


def student_reads(built: Mapping[str, Method]) -> frozenset[str]:
    """Return the names of all features of the student that the methods read."""
    return frozenset().union(*(method.reads_of_student for method in built.values()))


def student_task(
    context: RunContext,
    data: TrainingData,
    network: nn.Module,
    engine: Engine,
    built: Mapping[str, Method],
    *,
    normalize: nn.Module | None = None,
) -> tuple[DistillationTask, TeacherCache | None]:
    """Build the task, and the teacher cache unless the teachers run in every step.

    Args:
        network: the student, or the readouts of a fake-quantized one, which continues the student's training
            and is not averaged.
        normalize: replaces the student's mean and std.
    """
    o, round_ = context.options, context.round
    continues = isinstance(network, QuantizedReadouts)
    width = student_width(o, round_)
    if width is not None and not continues:
        widen(network, width, round_.seed)
    teachers, cache = [], None
    if built:
        teacher_engine = choose_run_engine(
            context, TEACHERS, lambda precision: inference_engine(context.device, precision)
        )
        if o.cache_views:
            cache = open_teacher_cache(context, data, built, teacher_engine)
        else:
            teachers = [load_teacher(context.folder.path, spec, teacher_engine) for spec in round_.teachers]
    task = DistillationTask(
        network,
        context.student.geometry,
        engine,
        label_task=context.task,
        label_smoothing=o.label_smoothing or 0.0,
        teachers=teachers,
        teacher_reads=[
            frozenset().union(*(method.reads_of_teachers[t] for method in built.values()))
            for t in range(len(teachers))
        ],
        methods=built,
        student_reads=student_reads(built),
        weights=loss_weights(o.weight, {name: type(method) for name, method in built.items()}),
        balance=o.balance == "auto",
        ema=None if continues else o.ema,
        average_last=None if continues else o.average_last,
        ranks=context.ranks,
        normalize=normalize,
        epochs_before=(o.epochs or 0) if continues else 0,
    )
    return task, cache


def loss_weights(weights: dict[str, float], classes: dict[str, type[Method]]) -> dict[str, float]:
    """Add the cross-entropy's weight: the paper's for a single method, otherwise 1."""
    ce = next(iter(classes.values())).cross_entropy if len(classes) == 1 else 1.0
    return {"ce": ce, **weights}


def save_heads(task: DistillationTask, path: Path) -> None:
    """Write the state of heads, balance and projection as safetensors."""
    parts: dict[str, Mapping[str, Any]] = dict(task.get_task_state())
    get_classifier = getattr(task.network, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, Widened):
        parts[_PROJECTION] = classifier.embed.state_dict()
    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, state in parts.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path)


def load_heads(task: DistillationTask, path: Path) -> None:
    """Load them into a task with the same methods."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    state = task.get_task_state()
    # State other than tensors, such as the sums of the last epoch, is not saved.
    task.load_task_state({part: {**state[part], **parts.get(part, {})} for part in state})


def load_projection(path: Path) -> nn.Linear | None:
    """Load the projection of the student's vector to another width; None if there is none."""
    prefix = f"{_PROJECTION}/"
    state = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    if not state:
        return None
    width, features = state["weight"].shape
    layer = torch.nn.utils.skip_init(nn.Linear, features, width, bias="bias" in state)
    layer.load_state_dict(state)
    return layer


def view_schedule(options: Options, policy: ViewPolicy, seed: int) -> ViewSchedule:
    """Return which views the student sees."""
    return ViewSchedule(policy, seed, options.cache_views or None)


def open_teacher_cache(
    context: RunContext, data: TrainingData, methods: Mapping[str, Method], engine: Engine
) -> TeacherCache:
    """Return the cache of the outputs that these methods read, computed with ``engine``."""
    teachers = context.round.teachers
    schedule = view_schedule(context.options, data.policy, context.round.seed)
    views = data.views(schedule.view_seed, teachers[0].image_size)

    def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
        plan = ((indices, torch.full_like(indices, view)) for indices in batches)
        return (pixels for pixels, *_ in views.batches(plan, context.device))

    run = context.folder.path
    sources = [
        TeacherSource(
            teacher.name,
            context.dataset_name,
            source_key(run, data, teacher, engine.precision),
            # Methods may read the same output.
            list({digest(o.key): o for m in methods.values() for o in m.cached_outputs(t)}.values()),
            partial(load_teacher, run, teacher, engine),
        )
        for t, teacher in enumerate(teachers)
    ]
    show = partial(context.progress.update, unit="images")
    return TeacherCache(context.cache, sources, len(views), render, show, context.ranks)


def source_key(run: Path, data: TrainingData, teacher: NetworkSpec, precision: str) -> dict[str, object]:
    """Return all that a teacher's outputs depend on, besides the view number."""
    geometry, policy = teacher.geometry, data.policy
    return {
        "weights": tensors_digest(run / teacher.file),
        "architecture": teacher.name,
        "precision": precision,
        "mean": list(geometry.mean),
        "std": list(geometry.std),
        "images": digest(data.train.keys.tolist()),
        "form": data.form,
        "policy": asdict(policy),
        **({"changes": augment.VERSION} if policy.randaugment or policy.erasing else {}),
        # Labeled images are mixed with labeled ones.
        "labeled": len(data.train.labeled) if policy.mixes else None,
        "seed": FIXED_SEED,
        "size": teacher.image_size,
    }


class QuantizedStudent(nn.Module):
    """The graph's input to logits [B,N]."""

    def __init__(self, graph: FakeQuantized) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)[self.graph.output]


class QuantizedReadouts(Readouts):
    """Features of a fake-quantized graph: a student that computes as its int8 file will.

    The graph that is trained is the exported one. Its tensors are matched to the features by value: the float
    network and the graph get the same images, and a tensor equal to a feature up to one factor is that
    feature (rewrite rules multiply maps by a constant, and a temperature divides the logits). Logits of cells
    are not in the graph: its steps after the map compute them from the means of the cells.

    Args:
        network: the float network from which the graph was exported.
        images: input of the network, float32 [n,3,H,W].
        graph_images: the same images as input of the graph.
        reads: names of the features.

    Raises:
        JobError: the graph does not compute one of the features.
    """

    network: QuantizedStudent

    def __init__(
        self, graph: FakeQuantized, network: nn.Module, images: Tensor, graph_images: Tensor, reads: Reads
    ) -> None:
        nn.Module.__init__(self)  # not that of Readouts, which explores a timm network
        self.network = QuantizedStudent(graph)
        self.embeds_alone = False
        self.projection: nn.Linear | None = None
        """The projection of a method that reads a wider vector than the network has."""
        matched = reads - {"cells"} | {"logits"} | ({"map"} if "cells" in reads else set())
        self.tensors, self.factors = _match_features(graph, network, images, graph_images, matched)

    @property
    def offers(self) -> Reads:
        return frozenset(self.tensors)

    def compile_features(self, mode: str | None) -> None:
        """Do nothing: the graph is computed node by node."""

    def forward(self, x: Tensor, reads: Reads = LOGITS, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return features of the graph's input, by name."""
        tensors = {read: tensor for read, tensor in self.tensors.items() if read in {*reads, "map"}}
        computed = self.network.graph(x, wanted=tensors.values())
        features = {read: computed[tensor] * self.factors[read] for read, tensor in tensors.items()}
        if self.projection is not None and "vector" in features:
            features["vector"] = self.projection(features["vector"])
        if "cells" in reads:
            features["cells"] = self._classify_cells(computed[tensors["map"]])
        return features

    def _classify_cells(self, f: Tensor) -> Tensor:
        """Return the logits [B,21,N] of a map's cells.

        After the map only weights are rounded: the ranges of activations are those of whole images.
        """
        graph, means = self.network.graph, average_cells(f)
        values = {self.tensors["map"]: means.flatten(0, 1)[:, :, None, None]}
        with graph.rounding(frozenset(graph.axes) if graph.only is None else graph.only):
            logits = graph.evaluate(self.tensors["logits"], values)
        return logits.unflatten(0, means.shape[:2]) * self.factors["logits"]


class PixelsToGraph(nn.Module):
    """uint8 [B,3,H,W] to the input of a graph whose weights contain the normalization."""

    def __init__(self, front: Folded) -> None:
        super().__init__()
        self.front = front

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if self.front.mask is not None:
            x = torch.cat([x, x.new_full((len(x), 1, *x.shape[2:]), self.front.mask)], dim=1)
        return (x - self.front.zero_point) / 255


@torch.no_grad()
def _match_features(
    graph: FakeQuantized, network: nn.Module, images: Tensor, graph_images: Tensor, reads: Reads
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """Return the name of the tensor that is each feature, and the factor from it to the feature."""
    expected = Readouts(network, images.shape[-1]).eval()(images, reads)
    names = [name for step in graph.steps for name in step.outputs]
    with graph.rounding(frozenset()):
        values = graph.eval()(graph_images, wanted=names)
    tensors, factors = {}, {}
    for read, value in expected.items():
        # The last match: it is rounded, as are the inputs of all nodes that follow.
        for name in names:
            factor = _match_factor(values[name], value)
            if factor is not None:
                tensors[read], factors[read] = name, factor
        if read not in tensors:
            raise JobError(
                f"--qat: the exported graph of the student does not compute the feature {read}, which the "
                "method reads. Omit --qat, or use a method on logits, such as --method kd."
            )
    return tensors, factors


def _match_factor(value: object, expected: Tensor) -> float | None:
    """Return c > 0 with expected = c·value, or None."""
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return None
    a, b = value.double().flatten(), expected.double().flatten()
    power = float(a @ a)
    if not power or not float(b @ b):
        return None
    factor = float(a @ b) / power
    if factor <= 0 or float((b - factor * a).norm()) > MATCH_TOLERANCE * float(b.norm()):
        return None
    return 1.0 if abs(factor - 1) < MATCH_TOLERANCE else factor
