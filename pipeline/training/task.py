"""One training step: views in, losses out. It knows neither the methods nor the data set."""

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
from torch.optim.swa_utils import AveragedModel

from ...models.build import Geometry
from ...models.fold import fold_batch_norm
from ...models.projection import merged
from ...models.readout import Readouts
from ..data.render import Normalize
from ..methods.base import Batch, Method
from ..methods.gradient_balance import GradientBalance
from ..runs.device import Engine
from ..runs.results import BalancedWeight
from ..tasks import CLASSIFICATION, Task
from .compute.distributed import Ranks
from .monitoring.profiling import Clock
from .quantized import QuantizedReadouts


LAST_MAP = ("map_pre", "map", "logits")
"""Where losses are compared: in the last map there is, where the methods read it."""


class Teacher(nn.Module):
    """A frozen network that answers with readouts: eval mode, no gradients, its own normalisation."""

    def __init__(self, network: nn.Module, geometry: Geometry, engine: Engine) -> None:
        super().__init__()
        size = self.image_size = geometry.image_size
        self.readouts = Readouts(fold_batch_norm(network, torch.randn(1, 3, size, size)), size)
        self.normalise = Normalize(geometry.mean, geometry.std)
        self.requires_grad_(False)
        self.eval()
        self.use(engine)

    def use(self, engine: Engine) -> None:
        """Compute by this engine from now on."""
        self.engine = engine
        self.to(memory_format=engine.memory_format)
        # Without CUDA graphs: theirs share memory with the student's, which may be at work at the same time.
        self.readouts.compile_features(None if engine.compile == "off" else "default")

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    # Not inference_mode: its tensors cannot be saved for the student's backward pass.
    @torch.no_grad()
    def forward(self, pixels: Tensor, reads: frozenset[str]) -> dict[str, Tensor]:
        with self.engine.autocast():
            images = self.normalise(pixels).contiguous(memory_format=self.engine.memory_format)
            return self.readouts(images, reads)


class StudentModule(nn.Module):
    """All that is trained: the network that ships, and the methods' heads that do not."""

    def __init__(
        self,
        network: nn.Module,
        geometry: Geometry,
        methods: Mapping[str, Method],
        reads: frozenset[str],
        weights: Mapping[str, float],
        label_loss: nn.Module,
        balance: bool,
        engine: Engine,
        ranks: Ranks,
        normalise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.readouts = Readouts(network) if not isinstance(network, QuantizedReadouts) else network
        self.normalise = normalise or Normalize(geometry.mean, geometry.std)
        self.methods = nn.ModuleDict(methods)
        self.last_map = next(read for read in LAST_MAP if read in self.readouts.offers)
        self.balance = GradientBalance(methods, ranks.sum) if balance and methods else None
        self.reads = reads | {"logits"} | ({self.last_map} if self.balance else set())
        self.weights = dict(weights)
        self.label_loss = label_loss
        self.engine = engine

    def use(self, engine: Engine) -> None:
        """Compute by this engine from now on."""
        self.engine = engine
        self.to(memory_format=engine.memory_format)
        self.readouts.compile_features(engine.compile_mode)

    def forward(
        self,
        pixels: Tensor,
        labels: Tensor,
        teachers: Sequence[Mapping[str, Tensor]],
        epoch: int,
        keys: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted losses by name, and the logits [B,N]."""
        images = self.normalise(pixels).contiguous(memory_format=self.engine.memory_format)
        alone = [name for name in self.methods if self._method(name).trains_projection_only(epoch)]
        self.readouts.embeds_alone = bool(alone)
        student = self.readouts(images, self.reads)
        entropy = self.label_loss(student["logits"].float(), labels)
        batch = Batch(student, teachers, labels, epoch, keys)
        with self.engine.autocast_heads():
            of_methods = {
                name: {
                    part: self.weights[name] * loss
                    for part, loss in method(batch).items()
                }
                for name, method in self.methods.items()
                if not alone or name in alone
            }
        if self.balance is not None and not alone:
            of_methods = self._balanced(of_methods, entropy, student[self.last_map], epoch)
        losses = {part: loss for parts in of_methods.values() for part, loss in parts.items()}
        if self.weights["ce"] and not alone:
            losses = {"ce": self.weights["ce"] * entropy, **losses}
        return losses, student["logits"]

    def _balanced(
        self, of_methods: dict[str, dict[str, Tensor]], entropy: Tensor, last_map: Tensor, epoch: int
    ) -> dict[str, dict[str, Tensor]]:
        assert self.balance is not None
        if self.balance.is_measuring:
            whole = {
                name: torch.stack(list(parts.values())).sum() / self._method(name).warmup_factor(epoch)
                for name, parts in of_methods.items()
            }
            self.balance.measure(whole, entropy, last_map)
        factors = self.balance.factors()
        return {
            name: {part: factors[name] * loss for part, loss in parts.items()}
            for name, parts in of_methods.items()
        }

    def embeds_alone(self, epoch: int) -> bool:
        """Whether nothing learns yet but the layer that widens the student's vector."""
        return any(self._method(name).trains_projection_only(epoch) for name in self.methods)

    def _method(self, name: str) -> Method:
        method = self.methods[name]
        assert isinstance(method, Method)
        return method


class Averages:
    """At most one of the two; without either the trained network itself is what ships.

    - ``ema``: θ' ← d·θ' + (1 − d)·θ after each step, with d rising to ``ema`` over the first steps (timm).
    - ``last``: the mean of θ after each of the last epochs, BatchNorm statistics too (Izmailov et al.:
      "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018).
    """

    def __init__(self, network: nn.Module, ema: float | None = None, last: int | None = None) -> None:
        self.network = network
        self.epochs = last
        self.ema = ModelEmaV3(network, decay=ema, use_warmup=True) if ema is not None else None
        self.last = AveragedModel(network, use_buffers=True) if last is not None else None
        self.steps = 0

    @property
    def shipped(self) -> nn.Module:
        """The network as it would ship now."""
        if self.ema is not None:
            return self.ema.module
        if self.last is not None and int(self.last.n_averaged):
            module: nn.Module = self.last.module
            return module
        return self.network

    def step(self) -> None:
        """After each step of the training."""
        if self.ema is not None:
            self.steps += 1
            self.ema.update(self.network, step=self.steps)

    def end_epoch(self, left: int) -> None:
        """After an epoch, when ``left`` are still to come."""
        if self.last is not None and self.epochs is not None and left < self.epochs:
            self.last.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps}
        for name, one in (("ema", self.ema), ("last", self.last)):
            if one is not None:
                state[name] = one.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for name, one in (("ema", self.ema), ("last", self.last)):
            if one is not None:
                one.load_state_dict(state[name])


_NEW_NAME = "forward_sync_buffers"
_SYNC_BUFFERS = (
    _NEW_NAME if _NEW_NAME in signature(DistributedDataParallel.__init__).parameters else "broadcast_buffers"
)
"""Torch has renamed what sends rank 0's buffers to all with every forward pass."""


class DistillationTask(TrainingTask):
    """A student, its methods and its frozen teachers as a timm task; without teachers, supervised."""

    trainable_module: nn.Module
    """The ``Trainee``, or what wraps it for several ranks."""

    def __init__(
        self,
        network: nn.Module,
        geometry: Geometry,
        engine: Engine,
        *,
        label_task: Task = CLASSIFICATION,
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
        normalise: nn.Module | None = None,
        epochs_before: int = 0,
    ) -> None:
        """
        Args:
            network: what is trained, a timm network or the readouts of a fake-quantized one.
            normalise: what brings pixels to it, where that is not the geometry's mean and deviation.
            epochs_before: how many the methods have seen already.
            teacher_reads: what the methods look at in each teacher.
            student_reads: what they look at in the student.
            weights: of each method by name and of the cross-entropy, ``ce``; default 1.
            teachers: none where the views' answers come from a store.
            balance: bring weights back that are out of proportion; see ``balance.py``.
            ema, average_last: what ships is an average; see ``averages.py``.
        """
        super().__init__(device=torch.device(engine.device), verbose=False)
        self.engine = engine
        self.label_task = label_task
        self.clock = Clock(engine.device)
        self.epochs_before = epochs_before
        self.epoch = 0
        methods = methods or {}
        self.trainable_module = StudentModule(
            network,
            geometry,
            methods,
            student_reads,
            {"ce": 1.0, **dict.fromkeys(methods, 1.0), **(weights or {})},
            label_task.label_loss(label_smoothing),
            balance,
            engine,
            ranks or Ranks(),
            normalise,
        )
        self.teachers = nn.ModuleList(teachers)
        self.teacher_reads = teacher_reads
        self.to(engine.device)
        self.use(engine)
        self.averages = Averages(self.network, ema, average_last)

    def use(self, engine: Engine) -> None:
        """Compute by this engine from now on, the teachers with its threads and compiled where it is."""
        self.engine = engine
        self.trainee.use(engine)
        for teacher in self.teachers:
            assert isinstance(teacher, Teacher)
            teacher.use(replace(teacher.engine, threads=engine.threads, compile=engine.compile))

    @property
    def teachers_size(self) -> int | None:
        """Side in pixels of what the teachers look at, all alike; None without teachers."""
        return next((teacher.image_size for teacher in self.teachers if isinstance(teacher, Teacher)), None)

    @property
    def trainee(self) -> StudentModule:
        trainee = unwrap_model(self.trainable_module)
        assert isinstance(trainee, StudentModule)
        return trainee

    @property
    def network(self) -> nn.Module:
        """The network that is trained."""
        return self.trainee.readouts.network

    @property
    def shipped(self) -> nn.Module:
        """The network that ships: the trained one, or an average of it over steps or epochs, with a plain
        classifier.
        """
        return merged(self.averages.shipped)

    def prepare_distributed(
        self, device_ids: list[int] | None = None, sync_bn: bool = False, **ddp_kwargs: Any
    ) -> "DistillationTask":
        """Let ranks exchange their gradients and, with ``sync_bn``, the statistics of BatchNorm."""
        if sync_bn:
            self.trainee.readouts.network = convert_sync_batchnorm(self.network)
        device = torch.device(self.engine.device)
        # Statistics are brought together once an epoch (``share_statistics``).
        ddp_kwargs.setdefault(_SYNC_BUFFERS, False)
        self.trainable_module = DistributedDataParallel(
            self.trainable_module,
            device_ids=[device.index] if device.type == "cuda" else device_ids,
            # Without a cross-entropy nothing may come back to the classifier.
            find_unused_parameters=not self.trainee.weights["ce"] or self.trainee.embeds_alone(0),
            **ddp_kwargs,
        )
        return self

    def update_ema(self, step: int | None = None) -> None:
        self.averages.step()

    def end_step(self) -> None:
        """After each step."""
        self.update_ema()
        if self.trainee.balance is not None:
            self.trainee.balance.end_step()

    def share_statistics(self, ranks: Ranks) -> None:
        """Take the mean of BatchNorm's running statistics, which each rank has of its own images."""
        if ranks.count > 1:
            for module in (self.trainee, self.averages.ema):
                if module is not None:
                    distribute_bn(module, ranks.count, reduce=True)

    def end_epoch(self, epoch: int, epochs: int) -> None:
        """After each epoch, from 0."""
        self.averages.end_epoch(epochs - epoch - 1)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        return self.network if module is None and not ema else super().get_eval_model(module, ema)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The methods' heads and their balance: needed to resume, not to ship."""
        return {} if ema else {name: part.state_dict() for name, part in self._beside_the_network().items()}

    def _beside_the_network(self) -> dict[str, nn.Module]:
        trainee = self.trainee
        parts: dict[str, nn.Module] = {"methods": trainee.methods}
        return parts if trainee.balance is None else {**parts, "balance": trainee.balance}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if not ema:
            for name, part in self._beside_the_network().items():
                part.load_state_dict((state or {}).get(name, {}), strict=strict)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        keys: Tensor | None = None,
        answers: Sequence[Mapping[str, Tensor]] | None = None,
        full: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            input: views, uint8 [B,3,S,S].
            target: class numbers [B], or float32 [B,N], 1 for each class of an image of a multi-label set.
            keys: int64 [B], what the methods' random draws follow.
            answers: the teachers' to these views; None asks the teachers.
            full: the same views at the teachers' size, where that is another.

        Returns:
            ``loss`` (the sum), ``output`` (the student's logits), and each weighted loss by name.
        """
        if answers is None:
            answers = self.ask(input if full is None else full) if len(self.teachers) else []
        with self.engine.autocast():
            epoch = self.epochs_before + self.epoch
            losses, logits = self.trainable_module(input, target, answers, epoch, keys)
        return {"loss": torch.stack(list(losses.values())).sum(), "output": logits.detach(), **losses}

    def ask(self, pixels: Tensor) -> list[Mapping[str, Tensor]]:
        """The teachers' readouts of views, uint8 [B,3,S,S]."""
        asked = zip(self.teachers, self.teacher_reads, strict=True)
        with self.clock("teacher"):
            return [teacher(pixels, reads) for teacher, reads in asked]

    def balanced(self) -> list[BalancedWeight]:
        """What the balance of the methods' weights found; it waits for the device."""
        balance = self.trainee.balance
        return [] if balance is None else balance.results()

    def scales(self) -> list[nn.Parameter]:
        """The methods' learned scales and temperatures."""
        found: list[nn.Parameter] = []
        for method in self.trainee.methods.values():
            assert isinstance(method, Method)
            found += method.scales()
        return found

    def watched(self) -> dict[str, Tensor]:
        """What the methods watch on all ranks, as scalars on the device; the call starts them anew."""
        watched: dict[str, Tensor] = {}
        for method in self.trainee.methods.values():
            assert isinstance(method, Method)
            watched |= method.metrics()
        return watched
