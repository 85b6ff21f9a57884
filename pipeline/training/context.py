"""What a stage runs with: the run, its networks and the current round of distillation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...models.build import resolve
from ..config.network import NetworkSpec
from ..config.options import Options
from ..config.stages import BASELINE, ROUND, get_round
from ..data.dataset import Placement
from ..runs.cache import Cache
from ..runs.console import Display, StageProgress
from ..runs.folder import RunFolder
from ..tasks.base import Task
from .distributed import Ranks

STUDENT = "student.safetensors"
"""Weights of the student that ships, in the run folder."""

_PLACEMENTS = {
    "host": "training images stay in host memory",
    "workers": "training images are decoded by workers on the fly",
}


@dataclass(frozen=True)
class Round:
    """A student and what it is trained with; with ``--rounds``, each student teaches the next one."""

    index: int
    """Number of the round, from 0."""
    student: NetworkSpec
    teachers: list[NetworkSpec]
    training: str
    """Name of the student's training, of its checkpoint and of its curves."""
    prepared: str
    """File in the run folder with the tensors that methods have prepared."""
    seed: int
    """Seed of the student's weights, of the order of images and of the views."""
    ships: bool


@dataclass(frozen=True)
class RunContext:
    """A run and its current stage."""

    options: Options
    """Resolved: no option is left open."""
    set_options: frozenset[str]
    """Names of the options that the user has set."""
    folder: RunFolder
    cache: Cache
    display: Display
    progress: StageProgress
    device: str
    task: Task
    dataset_name: str
    num_classes: int
    stage: str = ""
    key: str = ""
    """Hash of the stage's inputs; its checkpoints belong to this key."""
    ranks: Ranks = field(default_factory=Ranks)
    failed_trackers: set[str] = field(default_factory=set)
    write_report: Callable[[], None] = lambda: None
    """Writes the report of the unfinished run after an epoch."""
    gray_bits: int = 16
    """Number of bits that 16-bit gray images of the data use."""

    def for_stage(self, stage: str, key: str) -> "RunContext":
        self.progress.name = stage
        return replace(self, stage=stage, key=key)

    @cached_property
    def teachers(self) -> list[NetworkSpec]:
        """The networks named by ``--teacher``."""
        o, several = self.options, len(self.options.teacher) > 1
        assert o.image_size is not None
        return [
            NetworkSpec(
                resolve(name),
                o.image_size,
                0 if head == "none" else self.num_classes,
                f"teacher.{t}.safetensors" if several else "teacher.safetensors",
                resize=o.resize,
                gray_bits=self.gray_bits,
            )
            for t, (name, head) in enumerate(zip(o.teacher, o.teacher_head, strict=True))
        ]

    @cached_property
    def round(self) -> Round:
        """The round of the stage: the last one, whose student ships, except in the stages ``round K``.

        That of the stage ``baseline`` has no teachers.
        """
        k = get_round(self.stage)
        if self.stage == BASELINE:
            student = replace(self._student(None), file=f"{BASELINE}.safetensors")
            return Round(0, student, [], BASELINE, "", self.options.seed, ships=False)
        index = (k or self.options.rounds) - 1
        return Round(
            index=index,
            student=self._student(k),
            teachers=[self._student(index)] if index else self.teachers,
            training="student" if k is None else f"{ROUND} {k}",
            prepared="prepared.safetensors" if k is None else f"prepared.round.{k}.safetensors",
            seed=self.options.seed + index,
            ships=k is None,
        )

    @property
    def student(self) -> NetworkSpec:
        return self.round.student

    def _student(self, k: int | None) -> NetworkSpec:
        o = self.options
        size = o.student_size or o.image_size
        assert size is not None
        file = STUDENT if k is None else f"round.{k}.safetensors"
        name, bits = resolve(o.student), self.gray_bits
        return NetworkSpec(name, size, self.num_classes, file, o.activation, o.resize, bits)

    @property
    def has_pixel_input(self) -> bool:
        """Return True if exported files take uint8 pixels and normalize them."""
        return self.options.input == "uint8"

    def place(self, placement: Placement, reason: str | None) -> Placement:
        """Decide where training images are kept, and record it.

        On a GPU, views may differ by one level between images decoded once and images decoded by workers. So
        a resumed run does not change from one to the other.
        """
        recorded = self.folder.record.placement
        if recorded is not None and (recorded == "workers") != (placement == "workers"):
            placement = "workers" if recorded == "workers" else "host"
            reason = "as when this run was started"
        if reason:
            self.display.note(f"{_PLACEMENTS[placement]}: {reason}")
        self.folder.record.placement = placement
        self.folder.save()
        return placement
