"""Training steps of this package as subjects of ``throughput.py``."""

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
from questpress.pipeline.training.distributed import Ranks
from questpress.pipeline.training.engine_search import find_fastest_engine
from questpress.pipeline.training.loop import Batch, BatchSource, backward
from questpress.pipeline.training.metrics import Meter
from questpress.pipeline.training.optimizer import Plan, build_optimizer, build_scaler, build_scheduler
from questpress.pipeline.training.student import student_reads
from questpress.pipeline.training.task import DistillationTask, Teacher
from questpress.pipeline.training.teacher_cache import TeacherCache, TeacherSource
from torch import Tensor, nn

CLASSIFICATION = load_task("classification")

LEARNING_RATE = 1e-3
"""Small: training from random weights does not change the cost of a step."""

STEPS_AN_EPOCH = 10**9
"""A constant learning rate has no end."""


@dataclass(frozen=True)
class Setting:
    """The networks, images and machine, the same for all subjects."""

    teacher: str
    student: str
    size: int
    batch: int
    images: Sequence[Image]
    classes: int
    words: int
    top: int
    """Words of a cached target at each position."""
    positions: int
    """Positions drawn of each image, for subjects that do not use all."""
    device: str
    threads: int
    precision: str
    compile: str
    """See ``runs.device.Engine``."""
    workers: int
    scratch: Path
    """A folder for the teacher cache and the vocabulary."""
    weights: Path | None = None
    """The teacher's weights; None for random ones."""
    race: bool = False
    """Search for the student's fastest engine, as long trainings do, instead of using the default."""

    def network(self, name: str) -> nn.Module:
        """Build a network with the same weights for every subject."""
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
        """True if images are shifted by four pixels, as for CIFAR, instead of cropped and resized."""
        return self.size <= 64

    @cached_property
    def engine(self) -> Engine:
        """The engine of the student."""
        default = choose_engine(self.device, self.precision, self.network(self.student))
        default = replace(default, threads=self.threads, compile=self.compile)
        if not self.race:
            return default
        task = DistillationTask(
            self.network(self.student), self.geometry(self.student), default, label_task=CLASSIFICATION
        )
        first = next(self.stream())
        batch = first.pixels, first.labels, first.keys, first.teachers
        optimizer = partial(build_optimizer, plan=self.plan)
        fastest = find_fastest_engine(
            task, batch, optimizer, 10**6, precision=self.precision, compile="off", note=print
        ).engine
        return replace(fastest, threads=self.threads, compile=self.compile)

    @cached_property
    def teacher_engine(self) -> Engine:
        """The engine of the teacher."""
        return replace(
            inference_engine(self.device, self.precision), threads=self.threads, compile=self.compile
        )

    @cached_property
    def views(self) -> Views:
        """Training views as a run has them: decoded once, on the device."""
        if self.small:
            canonical = Canonical("fixed", self.size)
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
        self,
        cache: TeacherCache | None = None,
        compute_teachers: Callable[[Tensor], Sequence[Features]] | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches of all epochs: new views, or with a cache one fixed view of each image."""
        schedule = ViewSchedule(self.views.policy, 0, None if cache is None else 1)
        source = BatchSource(
            self.views,
            schedule,
            cache,
            self.plan,
            Ranks(),
            torch.device(self.device),
            compute_teachers=compute_teachers,
        )
        for epoch in count():
            source.open(epoch)
            yield from source.batches(epoch, self.plan.steps(len(self.views)), 0)

    @cached_property
    def frozen_teacher(self) -> Teacher:
        network = self.network(self.teacher)
        return Teacher(network, self.geometry(self.teacher), self.teacher_engine).to(self.device)

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.scratch / "cache")

    @cached_property
    def prepared(self) -> Mapping[str, Tensor]:
        """QuEST's vocabulary by one iteration of k-means; the cost of a step does not depend on the words."""
        quest = methods.load("quest")
        settings = {"quest.words": self.words, "quest.top": self.top, "quest.iterations": 1}
        teacher, student = self.shapes(self.teacher), self.shapes(self.student)
        height, width = shared_grid(
            student.maps[level_name("map", student)], teacher.maps[level_name("map", teacher)]
        )
        images = min(len(self.views), -(-FEATURES_PER_WORD * self.words // (height * width)))

        def features(_: int, reads: frozenset[str]) -> Iterable[Features]:
            for indices in torch.arange(images).split(self.batch):
                yield self.frozen_teacher(
                    self.views.batch(indices, torch.zeros_like(indices), self.device)[0], reads
                )

        def cached(_: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
            return self.cache.put(kind, digest(dict(key)), write)

        parameters = methods.parse_parameters(["quest"], settings)["quest"]
        preparation = PrepareContext(
            student=student,
            teachers=[teacher],
            teacher_names=[self.teacher],
            images=images,
            features=features,
            cached=cached,
            scratch=self.scratch,
            seed=0,
            note=lambda _: None,
            classifier=lambda _: None,
        )
        return quest.prepare(parameters, preparation).tensors

    def teacher_cache(self, built: Mapping[str, Method]) -> TeacherCache:
        """Return a cache of the outputs for one view, which are computed when it is opened."""

        def render(batches: Iterable[Tensor], view: int) -> Iterator[Tensor]:
            plan = ((indices, torch.full_like(indices, view)) for indices in batches)
            return (pixels for pixels, _ in self.views.batches(plan, self.device))

        outputs = [output for method in built.values() for output in method.cached_outputs(0)]
        source = TeacherSource(self.teacher, "images", {}, outputs, lambda: self.frozen_teacher)
        return TeacherCache(self.cache, [source], len(self.views), render, lambda *_: None)


def step(
    setting: Setting, method: str | None, *, stored: bool = False, **parameters: Any
) -> Callable[[], Meter]:
    """Return a function that runs one step of ``train`` and returns the sums of all steps' losses.

    Args:
        method: None trains without a teacher.
        stored: True if the teacher's outputs are cached.
        parameters: the method's parameters.
    """
    built: dict[str, Method] = {}
    student, teacher = setting.shapes(setting.student), setting.shapes(setting.teacher)
    if method is not None:
        settings = {f"{method}.{key}": value for key, value in parameters.items()}
        cls = methods.load(method)
        built[method] = cls(
            methods.parse_parameters([method], settings)[method],
            Setup(student, [teacher], setting.prepared if cls.prepares else {}),
        )
    online = method is not None and not stored
    task = DistillationTask(
        setting.network(setting.student),
        setting.geometry(setting.student),
        setting.engine,
        teachers=[setting.frozen_teacher] if online else [],
        teacher_reads=[built[method].reads_of_teachers[0]] if online else [],
        methods=built,
        student_reads=student_reads(built),
        label_task=CLASSIFICATION,
    )
    optimizer = build_optimizer(task, setting.plan)
    scheduler = build_scheduler(optimizer, setting.plan, STEPS_AN_EPOCH)
    scaler = build_scaler(task)
    meter = Meter(task.device, Ranks(), task.label_task)
    # As in ``train``: on a GPU, the teacher runs on the next batch concurrently with the student.
    compute_teachers = task.compute_teachers if online and task.device.type == "cuda" else None
    cache = setting.teacher_cache(built) if stored else None
    batches = task.clock.iterate("data", setting.stream(cache, compute_teachers))
    numbers = count()
    task.train()

    def step() -> Meter:
        batch, number = next(batches), next(numbers)
        torch.manual_seed(number)
        scheduler.step_update(number)
        with task.clock("student"):
            optimizer.zero_grad(set_to_none=True)
            backward(task, batch, None, meter, scaler)
            scaler.step(optimizer)
            scaler.update()
            task.end_step()
        return meter

    return step


def teacher_alone(setting: Setting) -> Callable[[], None]:
    """Return a function that runs the teacher on a batch of views, the least cost of online training."""
    views = next(setting.stream()).pixels
    reads = frozenset([level_name("map", setting.shapes(setting.teacher))])

    def step() -> None:
        setting.frozen_teacher(views, reads)

    return step
