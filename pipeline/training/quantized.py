"""A student that computes as its int8 file will, with the features that methods read.

The graph that is trained is the exported one. Its tensors are matched to the features by value: the float
network and the graph get the same images, and a tensor equal to a feature up to one factor is that feature
(rewrite rules multiply maps by a constant, and a temperature divides the logits).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...export.conversion.pixel_input import Folded
from ...export.int8.fake_quantize import FakeQuantized
from ...models.readout import LOGITS, Readouts, Reads
from ..errors import JobError

TOLERANCE = 1e-3
"""Largest difference of a tensor from a feature, as a fraction of the feature's norm."""


class QuantizedStudent(nn.Module):
    """The graph's input to logits [B,N]."""

    def __init__(self, graph: FakeQuantized) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)[self.graph.output]


class QuantizedReadouts(Readouts):
    """Features of a fake-quantized graph.

    Args:
        network: the float network from which the graph was exported.
        images: input of the network, float32 [n,3,S,S].
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
        self.tensors, self.factors = _match(graph, network, images, graph_images, reads | {"logits"})

    @property
    def offers(self) -> Reads:
        return frozenset(self.tensors)

    def compile_features(self, mode: str | None) -> None:
        """Do nothing: the graph is computed node by node."""

    def forward(self, x: Tensor, reads: Reads = LOGITS) -> dict[str, Tensor]:
        """Return features of the graph's input, by name."""
        computed = self.network.graph(x, wanted=[self.tensors[read] for read in reads])
        features = {read: computed[self.tensors[read]] * self.factors[read] for read in reads}
        if self.projection is not None and "vector" in features:
            features["vector"] = self.projection(features["vector"])
        return features


class PixelsToGraph(nn.Module):
    """uint8 [B,3,S,S] to the input of a graph whose weights contain the normalization."""

    def __init__(self, front: Folded) -> None:
        super().__init__()
        self.front = front

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if self.front.mask is not None:
            x = torch.cat([x, x.new_full((len(x), 1, *x.shape[2:]), self.front.mask)], dim=1)
        return (x - self.front.zero_point) / 255


@torch.no_grad()
def _match(
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
            factor = _factor(values[name], value)
            if factor is not None:
                tensors[read], factors[read] = name, factor
        if read not in tensors:
            raise JobError(
                f"--qat: the exported graph of the student does not compute the feature {read}, which the "
                "method reads. Omit --qat, or use a method on logits, such as --method kd."
            )
    return tensors, factors


def _factor(value: object, expected: Tensor) -> float | None:
    """Return c > 0 with expected = c·value, or None."""
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return None
    a, b = value.double().flatten(), expected.double().flatten()
    power = float(a @ a)
    if not power or not float(b @ b):
        return None
    factor = float(a @ b) / power
    if factor <= 0 or float((b - factor * a).norm()) > TOLERANCE * float(b.norm()):
        return None
    return 1.0 if abs(factor - 1) < TOLERANCE else factor
