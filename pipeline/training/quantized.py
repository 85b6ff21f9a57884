"""A student that computes as its int8 file will, with the readouts that methods look at.

The graph that learns is the exported one. Which of its tensors a readout is, is found by value: the float
network and the graph see the same images, and a tensor that equals the readout up to one factor is it (rules
of rewriting multiply maps by a constant, and a temperature divides the logits).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...export.conversion.pixel_input import Folded, Front
from ...export.int8.fake_quantize import FakeQuantized
from ...models.readout import Readouts, Reads
from ..errors import JobError

TOLERANCE = 1e-3
"""Largest difference, in norm, of a tensor from a readout that it is taken for."""


class QuantizedStudent(nn.Module):
    """Images as the graph takes them to logits [B,N]."""

    def __init__(self, graph: FakeQuantized) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.graph(x)[self.graph.output]
        return logits


class QuantizedReadouts(nn.Module):
    """What ``models.readout.Readouts`` is to a network, of a fake-quantized graph."""

    def __init__(
        self, graph: FakeQuantized, network: nn.Module, images: Tensor, taken: Tensor, reads: Reads
    ) -> None:
        """
        Args:
            network: the float network that the graph was exported from.
            images: what that one takes, float32 [n,3,S,S]; taken: the same images as the graph takes them.
            reads: the readouts that are wanted.

        Raises:
            JobError: the graph has no tensor that is one of them.
        """
        super().__init__()
        self.network = QuantizedStudent(graph)
        self.embeds_alone = False
        self.embed: nn.Linear | None = None
        """Of a method that looks at the vector through a linear layer of its own."""
        self.tensors, self.factors = _found(graph, network, images, taken, reads | {"logits"})

    @property
    def offers(self) -> Reads:
        return frozenset(self.tensors)

    def compile_features(self, mode: str | None) -> None:
        """The graph is computed node by node, whatever the engine."""

    def forward(self, x: Tensor, reads: Reads) -> dict[str, Tensor]:
        """Images as the graph takes them to the readouts asked for."""
        found = self.network.graph(x, wanted=[self.tensors[read] for read in reads])
        values = {read: found[self.tensors[read]] * self.factors[read] for read in reads}
        if self.embed is not None and "vector" in values:
            values["vector"] = self.embed(values["vector"])
        return values


class PixelsToGraph(nn.Module):
    """uint8 [B,3,S,S] to what the core of a file takes that has the normalisation in its weights."""

    def __init__(self, front: Folded) -> None:
        super().__init__()
        self.front = front

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if self.front.mask is not None:
            x = torch.cat([x, x.new_full((len(x), 1, *x.shape[2:]), self.front.mask)], dim=1)
        return (x - self.front.zero_point) / 255


def normalise_for(front: Front | None, usual: nn.Module) -> nn.Module:
    """What brings views to a graph with this front: ``usual``, but for one that normalises by itself."""
    return PixelsToGraph(front) if isinstance(front, Folded) else usual


@torch.no_grad()
def _found(
    graph: FakeQuantized, network: nn.Module, images: Tensor, taken: Tensor, reads: Reads
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    expected = Readouts(network, images.shape[-1]).eval()(images, reads)
    names = [name for step in graph.steps for name in step.outputs]
    with graph.rounding(frozenset()):
        values = graph.eval()(taken, wanted=names)
    tensors, factors = {}, {}
    for read, value in expected.items():
        # The last that equals it: what is read is rounded, as all that follows reads it.
        for name in names:
            factor = _factor(values[name], value)
            if factor is not None:
                tensors[read], factors[read] = name, factor
        if read not in tensors:
            raise JobError(
                f"--qat: the exported graph of the student has no tensor that is its {read}, which the "
                "method reads; leave --qat out, or take a method on logits, such as --method kd."
            )
    return tensors, factors


def _factor(found: object, expected: Tensor) -> float | None:
    """c > 0 with expected = c·found, if there is one."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return None
    a, b = found.double().flatten(), expected.double().flatten()
    power = float(a @ a)
    if not power or not float(b @ b):
        return None
    factor = float(a @ b) / power
    near = float((b - factor * a).norm()) <= TOLERANCE * float(b.norm())
    if not near or factor <= 0:
        return None
    return 1.0 if abs(factor - 1) < TOLERANCE else factor
