"""One training step: views in, losses out. It depends neither on the methods nor on the dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, distribute_bn, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from ...export.runtime import Size, height_width
from ...models.build import Geometry
from ...models.fold import fold_batch_norm
from ...models.readout import Readouts, merged, read_network
from ...models.rounding import round_weights
from ..data.render import Normalize
from ..methods.base import Batch, Features, Method
from ..methods.gradient_balance import GradientBalance
from ..runs.device import Engine
from ..runs.results import BalancedWeight
from ..tasks.base import Task
from .distributed import Ranks
from .metrics import Clock

LAST_MAP = ("map_pre", "map", "logits")
"""Gradients of losses are compared at the first of these that the network has."""


class Teacher(nn.Module):
    """A frozen network that returns features: eval mode, no gradients, with its own normalization."""

    def __init__(self, network: nn.Module, geometry: Geometry, engine: Engine) -> None:
        super().__init__()
        size = self.image_size = geometry.image_size
        self.readouts = read_network(fold_batch_norm(network, torch.randn(1, 3, *height_width(size))), size)
        self.normalize = Normalize(geometry.mean, geometry.std)
        self.requires_grad_(False)
        if engine.precision != "fp32":
            round_weights(self.readouts, engine.half)
        self.eval()
        self.use(engine)

    def use(self, engine: Engine) -> None:
        """Compute with this engine from now on."""
        self.engine, self.memory_format = engine, engine.memory_format
        self.autocast = engine.autocast()
        self.to(memory_format=self.memory_format)
        # Without CUDA graphs: theirs share memory with the student's, which may run at the same time.
        self.readouts.compile_features(None if engine.compile == "off" else "default")

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    # Not inference_mode, whose tensors cannot be saved for the student's backward pass.
    @torch.no_grad()
    def forward(self, pixels: Tensor, reads: frozenset[str]) -> dict[str, Tensor]:
        with self.autocast:
            images = self.normalize(pixels).contiguous(memory_format=self.memory_format)
            return self.readouts(images, reads)


class StudentModule(nn.Module):
    """Everything that is trained: the network that ships, and the methods' heads, which do not ship.

    For the arguments see :class:`DistillationTask`, which builds it.
    """

    def __init__(
        self,
        network: nn.Module,
        normalize: nn.Module,
        methods: Mapping[str, Method],
        reads: frozenset[str],
        weights: Mapping[str, float],
        label_task: Task,
        label_smoothing: float,
        balance: bool,
        engine: Engine,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.readouts = network if isinstance(network, Readouts) else read_network(network)
        self.normalize = normalize
        self.methods = nn.ModuleDict(methods)
        self.last_map = next(name for name in LAST_MAP if name in self.readouts.offers)
        self.balance = GradientBalance(methods, ranks.sum) if balance and methods else None
        self.loss_read = label_task.loss_read
        self.reads = reads | {self.loss_read} | ({self.last_map} if self.balance else set())
        self.weights = dict(weights)
        self.labeled_fraction = 1.0
        """Fraction of a step's images that have labels."""
        self.label_loss = label_task.label_loss(label_smoothing)
        self.main_labels = label_task.main_labels
        self.use(engine)

    def use(self, engine: Engine) -> None:
        """Compute with this engine from now on."""
        self.memory_format = engine.memory_format
        self.autocast_heads = engine.autocast_heads()
        self.to(memory_format=self.memory_format)
        self.readouts.compile_features(engine.compile_mode)

    def forward(
        self, pixels: Tensor, labels: Tensor, teachers: Sequence[Features], epoch: int, keys: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weighted losses by name, and the feature that the loss on labels is computed from.

        Each is a mean over the images: in a micro-batch with fewer labeled images than in others, the loss on
        labels is smaller accordingly.
        """
        images = self.normalize(pixels).contiguous(memory_format=self.memory_format)
        methods = dict(self.named_methods())
        alone = {name: m for name, m in methods.items() if m.trains_projection_only(epoch)}
        self.readouts.embeds_alone = bool(alone)
        features = self.readouts(images, self.reads, labels)
        label_loss = self.label_loss(features[self.loss_read], labels)
        label_loss = label_loss * (len(labels) / len(pixels) / self.labeled_fraction)
        batch = Batch(features, teachers, self.main_labels(labels), epoch, keys)
        with self.autocast_heads:
            by_method = {
                name: {part: self.weights[name] * loss for part, loss in method(batch).items()}
                for name, method in (alone or methods).items()
            }
        if self.balance is not None and not alone:
            if self.balance.is_measuring:
                full = {
                    name: torch.stack(list(parts.values())).sum() / methods[name].warmup_factor(epoch)
                    for name, parts in by_method.items()
                }
                self.balance.measure(full, label_loss, features[self.last_map])
            factors = self.balance.factors()
            by_method = {
                name: {part: factors[name] * loss for part, loss in parts.items()}
                for name, parts in by_method.items()
            }
        losses = {part: loss for parts in by_method.values() for part, loss in parts.items()}
        if self.weights["ce"] and not alone:
            losses = {"ce": self.weights["ce"] * label_loss, **losses}
        return losses, features[self.loss_read]

    def named_methods(self) -> list[tuple[str, Method]]:
        return [(name, method) for name, method in self.methods.items() if isinstance(method, Method)]

    def trains_projection_only(self, epoch: int) -> bool:
        """Return True if only the projection of the student's vector is trained in this epoch."""
        return any(method.trains_projection_only(epoch) for _, method in self.named_methods())


class Averages:
    """An average of the weights that ships instead of the trained network.

    At most one of the two:

    - ``ema``: θ' ← d·θ' + (1 − d)·θ after each step, with d rising to ``ema`` over the first steps (timm).
    - ``last``: the mean of θ after each of the last epochs, BatchNorm statistics too (Izmailov et al.:
      "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018).
    """

    def __init__(self, network: nn.Module, ema: float | None = None, last: int | None = None) -> None:
        self.network = network
        self.epochs = last
        self.ema = ModelEmaV3(network, decay=ema, use_warmup=True) if ema is not None else None
        # Without `avg_fn`, torch's multi-tensor average on GPUs rejects the integer buffers of BatchNorm.
        average = get_swa_avg_fn()
        self.last = AveragedModel(network, avg_fn=average, use_buffers=True) if last is not None else None
        self.steps = 0

    @property
    def shipped(self) -> nn.Module:
        if self.ema is not None:
            return self.ema.module
        return self.last.module if self.last is not None and int(self.last.n_averaged) else self.network

    def end_step(self) -> None:
        if self.ema is not None:
            self.steps += 1
            self.ema.update(self.network, step=self.steps)

    def end_epoch(self, epochs_left: int) -> None:
        if self.last is not None and self.epochs is not None and epochs_left < self.epochs:
            self.last.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        averages = {"ema": self.ema, "last": self.last}
        return {"steps": self.steps, **{k: a.state_dict() for k, a in averages.items() if a is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for name, average in (("ema", self.ema), ("last", self.last)):
            if average is not None:
                average.load_state_dict(state[name])


_DDP_ARGUMENTS = signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"
"""Argument of DistributedDataParallel, renamed by torch, that broadcasts rank 0's buffers in each step."""


class DistillationTask(TrainingTask):
    """A student, its methods and its frozen teachers as a timm task; supervised training without teachers."""

    trainable_module: nn.Module
    """The ``StudentModule``, or its DistributedDataParallel wrapper."""

    def __init__(
        self,
        network: nn.Module,
        geometry: Geometry,
        engine: Engine,
        *,
        label_task: Task,
        label_smoothing: float = 0.0,
        teachers: Sequence[Teacher] = (),
        teacher_reads: Sequence[frozenset[str]] = (),
        methods: Mapping[str, Method] | None = None,
        student_reads: frozenset[str] = frozenset(),
        weights: Mapping[str, float] | None = None,
        balance: bool = False,
        ema: float | None = None,
        average_last: int | None = None,
        ranks: Ranks | None = None,
        normalize: nn.Module | None = None,
        epochs_before: int = 0,
    ) -> None:
        """Build the task.

        Args:
            network: a timm network, or the readouts of a fake-quantized one.
            teachers: none if the teachers' outputs are cached.
            teacher_reads, student_reads: features that the methods read.
            weights: of each method by name, and of the cross-entropy, ``ce``; by default 1.
            balance: adjust the methods' weights (see ``methods/gradient_balance.py``).
            ema, average_last: ship an average (see :class:`Averages`).
            normalize: replaces the geometry's mean and std.
            epochs_before: number of epochs that the methods have been trained for.
        """
        super().__init__(device=torch.device(engine.device), verbose=False)
        self.label_task = label_task
        self.clock = Clock(engine.device)
        self.epochs_before = epochs_before
        self.epoch = 0
        methods = methods or {}
        self.trainable_module = StudentModule(
            network,
            normalize or Normalize(geometry.mean, geometry.std),
            methods,
            student_reads,
            {"ce": 1.0, **dict.fromkeys(methods, 1.0), **(weights or {})},
            label_task,
            label_smoothing,
            balance,
            engine,
            ranks or Ranks(),
        )
        self.teachers = nn.ModuleList(teachers)
        self.teacher_reads = teacher_reads
        self.to(engine.device)
        self.use(engine)
        self.averages = Averages(self.network, ema, average_last)

    def use(self, engine: Engine) -> None:
        """Compute with this engine from now on. Teachers keep their precision."""
        self.engine = engine
        self.autocast = engine.autocast()
        self.student.use(engine)
        for teacher in self.teachers:
            assert isinstance(teacher, Teacher)
            teacher.use(replace(teacher.engine, threads=engine.threads, compile=engine.compile))

    @property
    def teacher_size(self) -> Size | None:
        """Pixels of all teachers' input; None without teachers."""
        return next((teacher.image_size for teacher in self.teachers if isinstance(teacher, Teacher)), None)

    @property
    def student(self) -> StudentModule:
        student = unwrap_model(self.trainable_module)
        assert isinstance(student, StudentModule)
        return student

    @property
    def network(self) -> nn.Module:
        return self.student.readouts.network

    @property
    def shipped(self) -> nn.Module:
        """The network that ships: the trained one or its average, with a plain classifier."""
        return merged(self.averages.shipped)

    def prepare_distributed(
        self, device_ids: list[int] | None = None, sync_bn: bool = False, **ddp_kwargs: Any
    ) -> "DistillationTask":
        """Exchange gradients between ranks and, with ``sync_bn``, BatchNorm statistics of each step."""
        if sync_bn:
            self.student.readouts.network = convert_sync_batchnorm(self.network)
        device = torch.device(self.engine.device)
        ddp_kwargs.setdefault(_SYNC_BUFFERS, False)  # averaged once per epoch instead
        self.trainable_module = DistributedDataParallel(
            self.trainable_module,
            device_ids=[device.index] if device.type == "cuda" else device_ids,
            # Without a cross-entropy the classifier may get no gradient.
            find_unused_parameters=not self.student.weights["ce"] or self.student.trains_projection_only(0),
            **ddp_kwargs,
        )
        return self

    def end_step(self) -> None:
        self.averages.end_step()
        if self.student.balance is not None:
            self.student.balance.end_step()

    def average_statistics(self, ranks: Ranks) -> None:
        """Average BatchNorm's running statistics over ranks."""
        for module in (self.student, self.averages.ema) if ranks.count > 1 else ():
            if module is not None:
                distribute_bn(module, ranks.count, reduce=True)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        return self.network if module is None and not ema else super().get_eval_model(module, ema)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of heads and balance: needed to resume, not to ship."""
        return {} if ema else {name: part.state_dict() for name, part in self._task_modules().items()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if not ema:
            for name, part in self._task_modules().items():
                part.load_state_dict((state or {}).get(name, {}), strict=strict)

    def _task_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"methods": self.student.methods}
        return modules if self.student.balance is None else {**modules, "balance": self.student.balance}

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        keys: Tensor | None = None,
        teachers: Sequence[Features] | None = None,
        teacher_pixels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            input: views, uint8 [B,3,H,W].
            target: labels of the first L images, as ``data.render.LabeledViews`` has them; the others have
                none.
            keys: int64 [B], the seed of the methods' random draws.
            teachers: the teachers' features of these views; None runs the teachers.
            teacher_pixels: the same views at the teachers' size, if it differs.

        Returns:
            ``loss`` (the sum), ``output`` (the student's logits), and each weighted loss by name.
        """
        if teachers is None:
            pixels = input if teacher_pixels is None else teacher_pixels
            teachers = self.compute_teachers(pixels) if len(self.teachers) else []
        with self.autocast:
            epoch = self.epochs_before + self.epoch
            losses, logits = self.trainable_module(input, target, teachers, epoch, keys)
        return {"loss": torch.stack(list(losses.values())).sum(), "output": logits.detach(), **losses}

    def compute_teachers(self, pixels: Tensor) -> list[Features]:
        """Return the teachers' features of views, uint8 [B,3,H,W]."""
        with self.clock("teacher"):
            pairs = zip(self.teachers, self.teacher_reads, strict=True)
            return [teacher(pixels, reads) for teacher, reads in pairs]

    def balanced_weights(self) -> list[BalancedWeight]:
        """Return the adjusted weights of the methods. The host waits for the device here."""
        return [] if self.student.balance is None else self.student.balance.results()

    def scales(self) -> list[nn.Parameter]:
        """Return the methods' learned scales and temperatures."""
        return [scale for _, method in self.student.named_methods() for scale in method.scales()]

    def metrics(self) -> dict[str, Tensor]:
        """Return the methods' metrics over all ranks since the last call, as scalars on the device."""
        metrics = [method.metrics() for _, method in self.student.named_methods()]
        return {name: value for values in metrics for name, value in values.items()}
