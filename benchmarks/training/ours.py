"""Our own training steps as subjects for ``throughput.py``: all that knows how our engine is put together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from questpress.models.build import Geometry, build, geometry
from questpress.models.checkpoint import read_checkpoint
from questpress.models.weights import load_into
from questpress.pipeline import methods
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.data.decode import Canonical, decode_images
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.views import ViewPolicy, ViewSchedule
from questpress.pipeline.methods.base import Features, Method, PrepareContext, Setup, Shapes, shared_grid
from questpress.pipeline.methods.quest.quest import level_name
from questpress.pipeline.methods.quest.vocabulary import FEATURES_PER_WORD
from questpress.pipeline.methods.shapes import compute_shapes
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.device import Engine, choose_engine, inference_engine
from questpress.pipeline.runs.hashes import digest
from questpress.pipeline.tasks import load_task
from questpress.pipeline.training.compute.distributed import Ranks
from questpress.pipeline.training.compute.engine_search import find_fastest_engine
from questpress.pipeline.training.loop import Batch, BatchSource, ComputeTeachers, backward
from questpress.pipeline.training.monitoring.meter import Meter
from questpress.pipeline.training.optimizer import Plan, build_optimizer, build_scheduler
from questpress.pipeline.training.task import DistillationTask, Teacher
from questpress.pipeline.training.teacher_cache import TeacherCache, TeacherSource
from torch import Tensor, nn

CLASSIFICATION = load_task("classification")

LEARNING_RATE = 1e-3
"""Small: the networks start at random, and what they learn changes no step's cost."""


STEPS_AN_EPOCH = 10**9
"""A constant learning rate has no end."""


@dataclass(frozen=True)
class Setting:
    """A pair of networks, its images and the machine: the same for all subjects."""

    teacher: str
    student: str
    size: int
    batch: int
    images: Sequence[Image]
    classes: int
    words: int
    top: int
    """Words that a stored target keeps at each position."""
    positions: int
    """Drawn for each image, where not all are taken."""
    device: str
    threads: int
    precision: str
    compile: str
    """Of our engine; see ``device.Engine``."""
    workers: int
    scratch: Path
    """A folder for the store and the vocabulary."""
    weights: Path | None = None
    """Of the teacher; None: random ones."""
    race: bool = False
    """Whether the student's engine is the fastest in a race, as long trainings choose it, or the rule's."""

    def network(self, name: str) -> nn.Module:
        """Equal weights for every subject."""
        network = build(name, num_classes=self.classes, image_size=self.size, seed=0)
        if name == self.teacher and self.weights is not None:
            load_into(network, read_checkpoint(self.weights), allow_head_mismatch=True)
        return network

    def geometry(self, name: str) -> Geometry:
        return geometry(name, self.size)

    def shapes(self, name: str) -> Shapes:
        return compute_shapes(name, self.classes, self.size)

    @cached_property
    def small(self) -> bool:
        """Whether images are shifted by four pixels, as CIFAR's are, instead of cropped and resized."""
        return self.size <= 64

    @cached_property
    def engine(self) -> Engine:
        """The student's."""
        rule = choose_engine(self.device, self.precision, self.network(self.student))
        rule = replace(rule, threads=self.threads, compile=self.compile)
        if not self.race:
            return rule
        alone = DistillationTask(
            self.network(self.student), self.geometry(self.student), rule, label_task=CLASSIFICATION
        )
        first = next(self.stream())
        batch = first.pixels, first.labels, first.keys, first.teachers
        optimizer = partial(build_optimizer, plan=self.plan)
        found = find_fastest_engine(
            alone, batch, optimizer, 10**6, precision=self.precision, compile="off", note=print
        ).engine
        return replace(found, threads=self.threads, compile=self.compile)

    @cached_property
    def answering(self) -> Engine:
        """The teacher's."""
        return replace(
            inference_engine(self.device, self.precision), threads=self.threads, compile=self.compile
        )

    @cached_property
    def views(self) -> Views:
        """Training views as a run has them: decoded once, on the device."""
        if self.small:
            canonical = Canonical("square", self.size)
            policy = ViewPolicy("pad_crop", side=self.size, crop=self.size, pad=4)
        else:
            canonical, policy = Canonical("short_side", round(1.5 * self.size)), ViewPolicy("resized_crop")
        decoded = decode_images(self.images, canonical)
        return Views(decoded.labels, decoded.keys, policy, 0, self.size, decoded.pixels.to(self.device))

    @cached_property
    def plan(self) -> Plan:
        return Plan(
            epochs=1,
            batch_size=self.batch,
            optimizer="sgd",
            lr=LEARNING_RATE,
            schedule="constant",
            milestones=(),
            warmup_epochs=0,
            weight_decay=5e-4,
            decay_all=False,
            seed=0,
        )

    def stream(
        self, store: TeacherCache | None = None, ask: ComputeTeachers | None = None
    ) -> Iterator[Batch]:
        """Batches, epoch after epoch: new views each time, or from a store one fixed view of each image."""
        shown = ViewSchedule(self.views.policy, 0, None if store is None else 1)
        source = BatchSource(self.views, shown, store, self.plan, Ranks(), torch.device(self.device), ask)
        for epoch in count():
            source.open(epoch)
            yield from source.batches(epoch, self.plan.steps(len(self.views)), 0)

    @cached_property
    def frozen(self) -> Teacher:
        network = self.network(self.teacher)
        return Teacher(network, self.geometry(self.teacher), self.answering).to(self.device)

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.scratch / "cache")

    @cached_property
    def prepared(self) -> Mapping[str, Tensor]:
        """QuEST's vocabulary by one iteration of k-means: a step costs the same whatever the words are."""
        quest = methods.load("quest")
        settings = {"quest.words": self.words, "quest.top": self.top, "quest.iterations": 1}
        teacher, student = self.shapes(self.teacher), self.shapes(self.student)
        height, width = shared_grid(
            student.maps[level_name("map", student)], teacher.maps[level_name("map", teacher)]
        )
        wanted = min(len(self.views), -(-FEATURES_PER_WORD * self.words // (height * width)))

        def answers(_: int, reads: frozenset[str]) -> Iterable[Features]:
            for indices in torch.arange(wanted).split(self.batch):
                yield self.frozen(self.views.batch(indices, torch.zeros_like(indices), self.device)[0], reads)

        def shared(_: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
            return self.cache.put(kind, digest(dict(key)), write)

        own = methods.parse_parameters(["quest"], settings)["quest"]
        preparation = PrepareContext(
            student=student,
            teachers=[teacher],
            teacher_names=[self.teacher],
            images=wanted,
            features=answers,
            cached=shared,
            scratch=self.scratch,
            seed=0,
            note=lambda _: None,
            classifier=lambda _: None,
        )
        return quest.prepare(own, preparation).tensors

    def store(self, heads: Mapping[str, Method]) -> TeacherCache:
        """One view of all images, answered by the teacher here and now."""

        def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
            plan = ((indices, torch.full_like(indices, view)) for indices in batches)
            return (pixels for pixels, _ in self.views.batches(plan, self.device))

        answers = [answer for head in heads.values() for answer in head.cached_outputs(0)]
        source = TeacherSource(self.teacher, "images", {}, answers, lambda: self.frozen)
        return TeacherCache(self.cache, [source], len(self.views), render, lambda *_: None)


def step(
    setting: Setting, method: str | None, *, stored: bool = False, **parameters: Any
) -> Callable[[], None]:
    """A step as ``train`` makes it: views, the teacher's answers where there is one, learning, counting.

    Args:
        method: by which the student learns; None: without a teacher.
        stored: whether the answers come from a store, or the teacher is asked.
        parameters: the method's.
    """
    heads: dict[str, Method] = {}
    reads: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()
    student, teacher = setting.shapes(setting.student), setting.shapes(setting.teacher)
    if method is not None:
        settings = {f"{method}.{key}": value for key, value in parameters.items()}
        own = methods.parse_parameters([method], settings)[method]
        cls = methods.load(method)
        heads[method] = cls(own, Setup(student, [teacher], setting.prepared if cls.prepares else {}))
        reads, asked = cls.reads(own, student), cls.teacher_reads(own, teacher)
    online = method is not None and not stored
    task = DistillationTask(
        setting.network(setting.student),
        setting.geometry(setting.student),
        setting.engine,
        teachers=[setting.frozen] if online else [],
        teacher_reads=[asked] if online else [],
        methods=heads,
        student_reads=reads,
        label_task=CLASSIFICATION,
    )
    optimizer = build_optimizer(task, setting.plan)
    scheduler = build_scheduler(optimizer, setting.plan, STEPS_AN_EPOCH)
    meter = Meter(task.device, Ranks(), task.label_task)
    # As in ``train``: a GPU's teachers work on the next batch beside the student.
    ask = task.compute_teachers if online and task.device.type == "cuda" else None
    coming = task.clock.iterate("data", setting.stream(setting.store(heads) if stored else None, ask))
    numbers = count()
    task.train()

    def step() -> None:
        batch, number = next(coming), next(numbers)
        torch.manual_seed(number)
        scheduler.step_update(number)
        with task.clock("student"):
            optimizer.zero_grad(set_to_none=True)
            backward(task, batch, None, meter)
            optimizer.step()
            task.end_step()

    return step


def teacher_alone(setting: Setting) -> Callable[[], None]:
    """The teacher's answer to a batch of views that is there already: what online training adds at least."""
    views = next(setting.stream()).pixels
    reads = frozenset([level_name("map", setting.shapes(setting.teacher))])

    def step() -> None:
        setting.frozen(views, reads)

    return step
