"""Readouts: the features of a network that distillation methods use, from one forward pass.

- `map` [B,C,H,W]: the last feature map
- `map@i` [B,C,H,W]: the map of level i as timm counts them (0 the earliest, -1 the last)
- `map_pre` [B,C,H,W]: the last map before its ReLU; VGG networks only
- `vector` [B,D]: the penultimate vector, which the classifier (in a widened network, its last layer) reads
- `logits` [B,N]: the class scores
- `cells` [B,21,N]: the class scores of the whole map and of its 2×2 and 4×4 cells

All maps are [B,C,H,W]: channels-last maps are permuted, and tokens are put back on their grid without class,
distillation and register tokens.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .errors import ModelError, Size, show_size
from .pooling import CELL_GRIDS, average_cells

Reads = frozenset[str]
LOGITS: Reads = frozenset({"logits"})
_MISSING = {
    "map": "has no feature map, which this method requires. Choose another model or a method on logits.",
    "map_pre": "has no map before a last ReLU. Only VGG networks do.",
    "cells": "does not classify the mean of its map linearly. Choose another model or a method on logits.",
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a network's features for one image: map and levels as (C, H, W), vector and logits as numbers.

    None, or no levels, for features that the network does not have; a network without a head has 0 logits.
    """

    map: tuple[int, int, int] | None
    vector: int | None
    logits: int
    levels: tuple[tuple[int, int, int], ...] = ()
    map_pre: tuple[int, int, int] | None = None
    towers: tuple[tuple[int, int, int], ...] = ()
    region_vector: int | None = None
    region_levels: int = 0
    cells: int = 0


class Readouts(nn.Module):
    """A timm network that returns features; the network itself is not changed.

    The shapes come from a forward pass in eval mode, which leaves weights, BatchNorm statistics, training
    flags and the random state untouched.

    Args:
        network: any module; without timm's `forward_features` it has logits only.
        image_size: pixels of the input; those of `build` if None.
    """

    def __init__(self, network: nn.Module, image_size: Size | None = None) -> None:
        super().__init__()
        self.network: Any = network  # timm's methods are not part of nn.Module
        built_as = getattr(network, "built_as", None)
        size = image_size or getattr(built_as, "image_size", None)
        if size is None:
            raise ModelError("image_size is required for a network that was not built by name.")
        self.name: str = built_as.name if built_as is not None else type(network).__name__
        # Layout of the family's features: "NCHW", "NHWC", "tokens" (by forward_intermediates) or None.
        self.layout: str | None = None
        self.norm = False
        self.classifier_reads_vector = self.classifier_is_all_left = False
        self.level_count = 0
        self.compiled: dict[str, Callable[..., Any]] = {}
        # If True, no layer of a widened network before the new one gets a gradient.
        self.embeds_alone = False
        self.shapes = self._explore(size)

    @property
    def offers(self) -> Reads:
        """Names of the features of this network; levels with non-negative numbers."""
        present = {
            "map": self.shapes.map,
            "map_pre": self.shapes.map_pre,
            "vector": self.shapes.vector,
            "logits": self.shapes.logits or None,
            "cells": self.shapes.cells or None,
        }
        names = {name for name, shape in present.items() if shape is not None}
        return frozenset(names | {f"map@{level}" for level in range(len(self.shapes.levels))})

    def check(self, reads: Reads) -> None:
        """Raise ModelError if the network does not have all requested features."""
        for read in sorted(reads):
            if read in self.offers or (read.startswith("map@") and self._level(read) is not None):
                continue
            if read in _MISSING:
                raise ModelError(f"Model {self.name} {_MISSING[read]}")
            if read.startswith("map@") and self.shapes.levels:
                levels = f"0 to {len(self.shapes.levels) - 1}"
                raise ModelError(
                    f"Model {self.name} has no feature map {read!r}. Choose a level from {levels}."
                )
            raise ModelError(
                f"Model {self.name} has no feature {read!r}. It has {', '.join(sorted(self.offers))}."
            )

    def check_widening(self) -> None:
        """Raise ModelError if `widen` is not possible: it needs one linear layer on the vector."""
        if not is_linear(_classifier(self.network)) or not self.classifier_is_all_left:
            raise ModelError(
                f"The classifier of {self.name} is not one linear layer on its penultimate vector, so a "
                "layer for another width cannot be merged into it. Choose another student, or a teacher "
                f"with a vector of {self.shapes.vector} numbers."
            )

    def forward(self, x: Tensor, reads: Reads = LOGITS, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the requested features of images [B,3,H,W] by name, and compute nothing else.

        `labels` are used by networks whose features in training depend on them, two-stage detectors.
        """
        if reads == LOGITS and self.shapes.logits and not self.compiled:
            return {"logits": self.network(x)}
        self.check(reads)
        return self._read(x, reads)

    def compile_features(self, mode: str | None) -> None:
        """Compile the network before the head by torch.compile with this mode; None to undo it.

        The network, its names and its forward pass are not changed. The head is not compiled, as gradients of
        losses are compared at the map before it. Networks without timm's parts, and passes that read
        `map_pre`, are not compiled.
        """
        self.compiled = {}
        if mode is None or self.shapes.vector is None:
            return
        for part in ("forward_features", "forward_intermediates"):
            if hasattr(self.network, part):
                # Sizes do not change during training.
                self.compiled[part] = torch.compile(getattr(self.network, part), dynamic=False, mode=mode)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions use this network's weights, so a copy must not have them.
        return {**super().__getstate__(), "compiled": {}}

    def _read(self, x: Tensor, reads: Reads) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        recording = _record_output(_pre_relu_layer(self.network), result)
        with recording if "map_pre" in reads else nullcontext():
            features, levels = self._features(x, reads)
        for read in reads:
            if read.startswith("map@"):
                result[read] = levels[self._level_index(read)]
        if "map" in reads:
            result["map"] = self._as_map(features, levels)
        if "cells" in reads:
            result["cells"] = _classifier(self.network)(average_cells(self._as_map(features, levels)))
        if "vector" in reads:
            result["vector"] = self._vector(features)
        if "logits" in reads:
            if "vector" in reads and self.classifier_reads_vector:
                result["logits"] = self._last_linear()(result["vector"])
            else:
                result["logits"] = self.network.forward_head(features)
        return result

    def _vector(self, features: Any) -> Tensor:
        vector: Tensor = self.network.forward_head(features, pre_logits=True).flatten(1)
        classifier = _classifier(self.network)
        if not isinstance(classifier, Widened):
            return vector
        embedded: Tensor = classifier.embed(vector.detach() if self.embeds_alone else vector)
        return embedded

    def _last_linear(self) -> Any:
        classifier = _classifier(self.network)
        return classifier.classifier if isinstance(classifier, Widened) else classifier

    def _features(self, x: Tensor, reads: Reads) -> tuple[Any, dict[int, Tensor]]:
        """Return the output of forward_features, and the requested maps by level number."""
        wanted = {self._level_index(read) for read in reads if read.startswith("map@")}
        if reads & {"map", "cells"} and self.layout == "tokens":
            wanted.add(self.level_count - 1)
        if not wanted:
            return self._part("forward_features", reads)(x), {}
        indices = sorted(wanted)
        only_levels = all(read.startswith("map@") for read in reads) or (reads == {"map"} and bool(wanted))
        output = self._part("forward_intermediates", reads)(
            x,
            indices=indices,
            norm=self.norm,
            stop_early=only_levels,
            output_fmt="NCHW",
            intermediates_only=only_levels,
        )
        features, maps = (None, output) if only_levels else output
        return features, dict(zip(indices, maps, strict=True))

    def _part(self, name: str, reads: Reads) -> Callable[..., Any]:
        part: Callable[..., Any] = getattr(self.network, name)
        return part if "map_pre" in reads else self.compiled.get(name, part)

    def _as_map(self, features: Tensor, levels: dict[int, Tensor]) -> Tensor:
        if self.layout == "tokens":
            return levels[self.level_count - 1]
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features

    def _level(self, read: str) -> int | None:
        """Return the non-negative number of `map@i`; None if there is no such level."""
        try:
            level = int(read.removeprefix("map@"))
        except ValueError:
            return None
        level += self.level_count if level < 0 else 0
        return level if 0 <= level < self.level_count else None

    def _level_index(self, read: str) -> int:
        level = self._level(read)
        assert level is not None  # see `check`
        return level

    @torch.no_grad()
    def _explore(self, image_size: Size) -> Shapes:
        """Determine the family's layout and all shapes by a forward pass of two random images."""
        headless = getattr(getattr(self.network, "built_as", None), "num_classes", None) == 0
        with _evaluating(self.network):
            x = _two_images(self.network, image_size)
            try:
                logits = self.network(x)
                if not headless and (isinstance(logits, (tuple, list)) or logits.dim() != 2):
                    raise ModelError(
                        f"Model {self.name} does not return one vector of class scores per image."
                    )
                if not hasattr(self.network, "forward_features"):
                    return Shapes(map=None, vector=None, logits=logits.shape[1])
                features = self.network.forward_features(x)
                levels = self._explore_levels(x)
            except ModelError:
                raise
            except Exception as error:  # whatever a forward pass of timm's thousand raises
                raise ModelError(
                    f"Model {self.name} cannot run on images of {show_size(image_size)} pixels: {error}"
                ) from error
            self.layout = self._find_layout(features)
            reads = {"map"} if self.layout is not None else set()
            if hasattr(self.network, "forward_head"):
                reads |= {"vector"}
                vector = self._vector(features)
                self.classifier_is_all_left = not headless and self._is_all_left(vector, logits)
                # With dropout between them, logits are computed by the head.
                drops = float(self.network.__dict__.get("drop_rate", 0.0)) > 0
                self.classifier_reads_vector = self.classifier_is_all_left and not drops
            if _pre_relu_layer(self.network) is not None:
                reads |= {"map_pre"}
            tensors = self._read(x, frozenset(reads))
            has_cells = {"map", "vector"} <= reads and self._classifies_mean(features, tensors["map"])
        sizes = {read: tuple(tensor.shape[1:]) for read, tensor in tensors.items()}
        return Shapes(
            map=_as_chw(sizes.get("map")),
            vector=sizes["vector"][0] if "vector" in sizes else None,
            logits=0 if headless else logits.shape[1],
            levels=tuple((level.shape[1], level.shape[2], level.shape[3]) for level in levels),
            map_pre=_as_chw(sizes.get("map_pre")),
            cells=sum(grid**2 for grid in CELL_GRIDS) if has_cells else 0,
        )

    def _explore_levels(self, x: Tensor) -> list[Tensor]:
        if not hasattr(self.network, "forward_intermediates"):
            return []
        for self.norm in (True, False):  # a few families cannot normalize intermediate maps
            try:
                levels: list[Tensor] = self.network.forward_intermediates(
                    x, norm=self.norm, output_fmt="NCHW", intermediates_only=True
                )
            except AssertionError:
                if self.norm:
                    continue
                raise
            self.level_count = len(levels)
            return levels
        return []

    def _find_layout(self, features: Any) -> str | None:
        if isinstance(features, Tensor) and features.dim() == 4:
            return "NHWC" if str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW"
        return "tokens" if self.level_count else None

    def _is_all_left(self, vector: Tensor, logits: Tensor) -> bool:
        """Return True if the logits are classifier(vector), apart from dropout."""
        classifier = self._last_linear()
        if not isinstance(classifier, (nn.Linear, nn.Identity)):
            return False
        if isinstance(classifier, nn.Linear) and classifier.in_features != vector.shape[1]:
            return False
        return logits.is_meta or torch.equal(classifier(vector), logits)

    def _classifies_mean(self, features: Any, f: Tensor) -> bool:
        """Return True if the classifier is linear on the mean of the map [B,C,H,W] over its positions."""
        vector = self.network.forward_head(features, pre_logits=True).flatten(1)
        if not self.classifier_is_all_left or vector.shape != f.shape[:2]:
            return False
        return f.is_meta or torch.allclose(vector, f.mean((2, 3)), rtol=1e-3, atol=1e-5)


def read_network(network: Any, image_size: Size | None = None) -> Readouts:
    """Return the readouts of a network: its own ones if it has some, as detectors do."""
    if hasattr(network, "readouts"):
        own: Readouts = network.readouts(image_size)
        return own
    return Readouts(network, image_size)


def _pre_relu_layer(network: nn.Module) -> nn.Module | None:
    """Return the layer before the last ReLU of a VGG; None for other networks."""
    name = getattr(network, "pre_relu_layer", None)
    if isinstance(name, str):
        return network.get_submodule(name)
    features = getattr(network, "features", None)
    if isinstance(features, nn.Sequential) and len(features) > 3:
        before, activation, pool = features[-3], features[-2], features[-1]
        if isinstance(activation, nn.ReLU) and isinstance(pool, nn.MaxPool2d):
            return before
    return None


@contextmanager
def _record_output(layer: nn.Module | None, result: dict[str, Tensor]) -> Iterator[None]:
    """Store the layer's output as `map_pre` and pass on a copy, since the ReLU may work in place."""
    assert layer is not None  # see `check`

    def keep(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        result["map_pre"] = output
        return output.clone()

    handle = layer.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode temporarily and restore the flag of each module."""
    flags = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _two_images(network: nn.Module, image_size: Size) -> Tensor:
    size = timm.layers.to_2tuple(image_size)
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(network.parameters(), noise))


def _as_chw(shape: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    return None if shape is None else (shape[0], shape[1], shape[2])


class Widened(nn.Module):
    """A classifier of two linear layers during training, merged exactly into one before export.

        logits = W_c·(W_e·v + b_e) + b_c = W'·v + b'      W' = W_c·W_e,  b' = W_c·b_e + b_c

    The vector in between can have any width, such as that of a teacher's vector. W_e starts with orthonormal
    columns (rows if it narrows), b_e as 0, and W_c = W·W_eᵀ, b_c = b with W, b of the original classifier:
    unless narrowed, the network computes the same at first, so a pretrained head is kept.
    """

    def __init__(self, linear: nn.Linear, width: int, seed: int) -> None:
        super().__init__()
        bias = linear.bias is not None  # as in the merged layer
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype, "bias": bias}
        # Skip the initialization, which would be discarded and would advance the random state.
        self.embed = nn.utils.skip_init(nn.Linear, linear.in_features, width, **like)
        self.classifier = nn.utils.skip_init(nn.Linear, width, linear.out_features, **like)
        start = torch.empty(width, linear.in_features)
        nn.init.orthogonal_(start, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.embed.weight.copy_(start)
            self.classifier.weight.copy_(linear.weight @ self.embed.weight.T)
            if bias:
                self.embed.bias.zero_()
                self.classifier.bias.copy_(linear.bias)

    def forward(self, vector: Tensor) -> Tensor:
        """Return logits [B,N] of vectors [B,D]."""
        logits: Tensor = self.classifier(self.embed(vector))
        return logits

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return one linear layer that computes the same up to rounding, multiplied in float64."""
        w_e, w_c = (layer.weight.detach().cpu().double() for layer in (self.embed, self.classifier))
        like: dict[str, Any] = {"device": self.embed.weight.device, "dtype": self.embed.weight.dtype}
        bias = self.classifier.bias is not None
        linear = nn.utils.skip_init(nn.Linear, w_e.shape[1], len(w_c), bias=bias, **like)
        linear.weight.copy_(w_c @ w_e)
        if bias:
            linear.bias.copy_(w_c @ self.embed.bias.cpu().double() + self.classifier.bias.cpu().double())
        return linear.train(self.training)


def widen(network: nn.Module, width: int, seed: int) -> None:
    """Replace a timm network's classifier by a `Widened`. Raises ModelError if it is not one linear layer."""
    linear = _classifier(network)
    if not is_linear(linear):
        raise ModelError(f"The classifier of {type(network).__name__} is not one linear layer.")
    _replace(network, linear, Widened(linear, width, seed))


def is_linear(layer: Any) -> bool:
    """Return True for torch's and timm's plain linear layers."""
    return type(layer) in (nn.Linear, timm.layers.Linear)


def merged(network: nn.Module) -> nn.Module:
    """Return a copy of a widened network with a plain classifier, or any other network itself."""
    if not isinstance(_classifier(network), Widened):
        return network
    plain = copy.deepcopy(network)
    widened = _classifier(plain)
    assert isinstance(widened, Widened)
    _replace(plain, widened, widened.merged())
    return plain


def _classifier(network: Any) -> Any:
    return network.get_classifier() if hasattr(network, "get_classifier") else None


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in network.named_modules() if module is old)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    if _classifier(network) is not new:
        raise ModelError(f"The classifier of {type(network).__name__} cannot be replaced.")
