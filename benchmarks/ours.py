"""Our own training steps as subjects for ``throughput.py``: all that knows how our engine is put together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from questpress.models.build import Geometry, build, geometry
from questpress.pipeline import methods
from questpress.pipeline.data.decode import Canonical, decode
from questpress.pipeline.data.image_set import Image
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.views import ViewPolicy
from questpress.pipeline.device import Engine, choose_engine, inference_engine
from questpress.pipeline.methods.base import Method, Shapes
from questpress.pipeline.methods.features import nearest
from questpress.pipeline.methods.grid import positions, shared_grid
from questpress.pipeline.methods.quest import readout
from questpress.pipeline.shapes import shapes
from questpress.pipeline.task import DistillationTask, Teacher
from questpress.pipeline.train import Meter, Plan, batches, build_optimizer
from torch import Tensor, nn

LEARNING_RATE = 1e-3
"""Small: the networks start at random, and what they learn changes no step's cost."""


@dataclass(frozen=True)
class Setting:
    """A pair of networks, its images and the machine: the same for all subjects."""

    teacher: str
    student: str
    size: int
    batch: int
    classes: int
    words: int
    device: str
    threads: int
    precision: str
    workers: int
    images: Sequence[Image]

    def network(self, name: str) -> nn.Module:
        """Equal weights for every subject."""
        return build(name, num_classes=self.classes, image_size=self.size, seed=0)

    def geometry(self, name: str) -> Geometry:
        return geometry(name, self.size)

    def shapes(self, name: str) -> Shapes:
        return shapes(name, self.classes, self.size)

    @cached_property
    def small(self) -> bool:
        """Whether images are shifted by four pixels, as CIFAR's are, instead of cropped and resized."""
        return self.size <= 64

    @cached_property
    def engine(self) -> Engine:
        """The student's."""
        chosen = choose_engine(self.device, self.precision, self.network(self.student))
        return Engine(chosen.device, self.threads, chosen.precision)

    @cached_property
    def answering(self) -> Engine:
        """The teacher's."""
        chosen = inference_engine(self.device, self.precision)
        return Engine(chosen.device, self.threads, chosen.precision)

    @cached_property
    def views(self) -> Views:
        """Training views as a run has them: decoded once, on the device."""
        if self.small:
            canonical = Canonical("square", self.size)
            policy = ViewPolicy("pad_crop", side=self.size, crop=self.size, pad=4)
        else:
            canonical, policy = Canonical("short_side", round(1.5 * self.size)), ViewPolicy("resized_crop")
        decoded = decode(self.images, canonical)
        return Views(decoded.pixels.to(self.device), decoded.labels, decoded.keys, policy, 0, self.size)

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
            label_smoothing=0.0,
            seed=0,
        )

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of views, uint8 [B,3,S,S], and labels [B], epoch after epoch."""
        steps = self.plan.steps(len(self.views))
        for epoch in count():
            yield from batches(self.views, self.plan, epoch, steps, torch.device(self.device))

    @cached_property
    def frozen(self) -> Teacher:
        network = self.network(self.teacher)
        return Teacher(network, self.geometry(self.teacher), self.answering).to(self.device)

    @cached_property
    def prepared(self) -> Mapping[str, Tensor]:
        """What QuEST's prepare leaves: here k random features are the words, as k-means begins with.

        A step costs the same whatever the words are.
        """
        level = readout("map", self.shapes(self.teacher))
        of_teacher = self.shapes(self.teacher).maps[level]
        of_student = self.shapes(self.student).maps[readout("map", self.shapes(self.student))]
        grid = shared_grid(of_student, of_teacher)
        stream, features = self.stream(), torch.empty(0, of_teacher[0])
        while len(features) < 2 * self.words:
            answer = self.frozen(next(stream)[0], frozenset([level]))[level].float().cpu()
            features = torch.cat([features, positions(answer, grid)])
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        words = features[order[: self.words]].contiguous()
        distance, _ = nearest(features[order[self.words :]].numpy(), words.numpy())
        return {"0.map.words": words, "0.map.mu": torch.tensor(float(distance.mean()))}


def task(setting: Setting, method: str | None, **parameters: Any) -> DistillationTask:
    """The student with one method, or alone, as the student stage builds it; its weights are not balanced."""
    heads: dict[str, Method] = {}
    reads: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()
    student, teacher = setting.shapes(setting.student), setting.shapes(setting.teacher)
    if method is not None:
        settings = {f"{method}.{key}": value for key, value in parameters.items()}
        own = methods.parameters([method], settings)[method]
        cls = methods.load(method)
        heads[method] = cls(own, student, [teacher], setting.prepared if cls.prepares else {})
        reads, asked = cls.reads(own, student), cls.teacher_reads(own, teacher)
    return DistillationTask(
        setting.network(setting.student),
        setting.geometry(setting.student),
        setting.engine,
        teachers=[] if method is None else [setting.frozen],
        teacher_reads=[] if method is None else [asked],
        methods=heads,
        student_reads=reads,
    )


def online(setting: Setting, method: str | None, **parameters: Any) -> Callable[[], None]:
    """A step as ``train`` makes it: render the views, ask the teacher where there is one, learn, count."""
    learning = task(setting, method, **parameters)
    optimizer = build_optimizer(learning, setting.plan)
    meter = Meter(learning.device)
    stream = setting.stream()
    learning.train()

    def step() -> None:
        images, labels = next(stream)
        result = learning(images, labels)
        optimizer.zero_grad(set_to_none=True)
        result["loss"].backward()
        optimizer.step()
        meter.add(result, labels)

    return step


def teacher_alone(setting: Setting) -> Callable[[], None]:
    """The teacher's answer to a batch of views that is there already: what online training adds at least."""
    views, _ = next(setting.stream())
    reads = frozenset([readout("map", setting.shapes(setting.teacher))])

    def step() -> None:
        setting.frozen(views, reads)

    return step
