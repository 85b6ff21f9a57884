"""The networks of a training step: frozen teachers, and what is trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.build import Geometry
from ..models.fold import fold_batch_norm
from ..models.readout import Readouts
from .cross_entropy import cross_entropy
from .data.render import Normalise
from .methods.base import Method
from .methods.gradient_balance import Balance
from .runs.device import Engine
from .training.compute.distributed import Ranks
from .training.quantized import QuantizedReadouts

LAST_MAP = ("map_pre", "map", "logits")
"""Where losses are compared: in the last map there is, where the methods read it."""


class Teacher(nn.Module):
    """A frozen network that answers with readouts: eval mode, no gradients, its own normalisation."""

    def __init__(self, network: nn.Module, geometry: Geometry, engine: Engine) -> None:
        super().__init__()
        size = self.image_size = geometry.image_size
        self.readouts = Readouts(fold_batch_norm(network, torch.randn(1, 3, size, size)), size)
        self.normalise = Normalise(geometry.mean, geometry.std)
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


class Trainee(nn.Module):
    """All that is trained: the network that ships, and the methods' heads that do not."""

    def __init__(
        self,
        network: nn.Module,
        geometry: Geometry,
        methods: Mapping[str, Method],
        reads: frozenset[str],
        weights: Mapping[str, float],
        label_smoothing: float,
        balance: bool,
        engine: Engine,
        ranks: Ranks,
        normalise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.readouts = Readouts(network) if not isinstance(network, QuantizedReadouts) else network
        self.normalise = normalise or Normalise(geometry.mean, geometry.std)
        self.methods = nn.ModuleDict(methods)
        self.last_map = next(read for read in LAST_MAP if read in self.readouts.offers)
        self.balance = Balance(methods, ranks) if balance and methods else None
        self.reads = reads | {"logits"} | ({self.last_map} if self.balance else set())
        self.weights = dict(weights)
        self.label_smoothing = label_smoothing
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
        alone = [name for name in self.methods if self._method(name).embeds_alone(epoch)]
        self.readouts.embeds_alone = bool(alone)
        student = self.readouts(images, self.reads)
        entropy = cross_entropy(student["logits"].float(), labels, self.label_smoothing)
        with self.engine.autocast_heads():
            of_methods = {
                name: {
                    part: self.weights[name] * loss
                    for part, loss in method(student, teachers, labels, epoch, keys).items()
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
        if self.balance.compares:
            whole = {
                name: torch.stack(list(parts.values())).sum() / self._method(name).strength(epoch)
                for name, parts in of_methods.items()
            }
            self.balance.compare(whole, entropy, last_map)
        factors = self.balance.factors()
        return {
            name: {part: factors[name] * loss for part, loss in parts.items()}
            for name, parts in of_methods.items()
        }

    def embeds_alone(self, epoch: int) -> bool:
        """Whether nothing learns yet but the layer that widens the student's vector."""
        return any(self._method(name).embeds_alone(epoch) for name in self.methods)

    def _method(self, name: str) -> Method:
        method = self.methods[name]
        assert isinstance(method, Method)
        return method
