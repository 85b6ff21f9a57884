"""Fold BatchNorm of a frozen network into the convolution before it.

In eval mode BatchNorm multiplies each channel by a constant and adds another. After a convolution both can be
part of its weights and bias, which saves a pass over the map.

Pairs are found by tracing a forward pass, not by names: the input of the BatchNorm must always be the output
of one convolution that nothing else uses. Otherwise (pre-activation, DenseNet's concatenations, a map that is
read before its BatchNorm) the BatchNorm stays. Cases that tracing cannot detect, such as standardized
weights, are found by comparing all features.
"""

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .readout import Readouts, read_network

TOLERANCE = 1e-9
"""Largest difference of a readout in float64, relative to its largest number; an exact folding has 1e-14."""

Pair = tuple[str, str]
"""Names of a convolution and of the BatchNorm after it."""


@torch.no_grad()
def fold_batch_norm(network: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of the network in eval mode with BatchNorms folded if its features stay the same.

    Folded weights are computed in float64 and rounded to the network's precision.

    Args:
        example: images [B,3,H,W] of the size that the network is used with; the first one is traced.
    """
    folded = copy.deepcopy(network).eval()
    if not any(map(_foldable, folded.modules())):
        return folded
    # In float64 a difference is an error, not rounding. MPS has no float64, so this runs on the CPU.
    image = example[:1].detach().cpu().double()
    size = image.shape[2], image.shape[3]
    readouts = read_network(copy.deepcopy(network).eval().cpu(), size).double()
    precise = readouts.network
    pairs, expected = _trace_pairs(readouts, image)
    weights = {id(tensor): tensor for tensor in (*precise.parameters(), *precise.buffers())}

    def same(tried: Sequence[Pair]) -> bool:
        attempt = copy.deepcopy(readouts, dict(weights))  # folding replaces weights and changes none
        _fold(attempt.network, precise, tried)
        try:
            actual = _read(attempt, image)
            return all(
                bool((actual[read] - value).abs().max() <= TOLERANCE * value.abs().max())
                for read, value in expected.items()
            )
        except Exception:  # the network reads attributes of its BatchNorm
            return False

    _fold(folded, precise, _largest_valid(pairs, same))
    return folded


def _foldable(module: nn.Module) -> bool:
    """Return True for a BatchNorm of torch, or of timm with an activation, that has fixed statistics."""
    forwards = (nn.BatchNorm2d.forward, BatchNormAct2d.forward)
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward in forwards
        and module.running_mean is not None
        and module.running_var is not None
    )


def _read(readouts: Readouts, image: Tensor) -> dict[str, Tensor]:
    """Return all features, and the output of the network's own forward pass.

    That of a detector is decoded from its logits, which are a feature.
    """
    features = readouts(image, readouts.offers)
    if hasattr(readouts.network, "decode"):
        return features
    return {**features, "forward": readouts.network(image)}


def _largest_valid(pairs: Sequence[Pair], same: Callable[[Sequence[Pair]], bool]) -> list[Pair]:
    """Return as many pairs as can be folded, by bisection if not all can."""
    if not pairs or same(pairs):
        return list(pairs)
    if len(pairs) == 1:
        return []
    middle = len(pairs) // 2
    first, second = _largest_valid(pairs[:middle], same), _largest_valid(pairs[middle:], same)
    # Each half is valid alone, and both together unless they interact.
    return [*first, *second] if same([*first, *second]) else first


def _trace_pairs(readouts: Readouts, image: Tensor) -> tuple[list[Pair], dict[str, Tensor]]:
    """Return candidate pairs in the order of execution, and the features of the unfolded network."""
    uses = _UseCounter()
    producers: dict[int, str] = {}
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    batch_norm_inputs: dict[str, list[Tensor]] = defaultdict(list)

    def record_output(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name].append(output)
            producers[id(output)] = name

        return hook

    def record_input(name: str) -> Any:
        return lambda _module, inputs: batch_norm_inputs[name].append(inputs[0])

    handles = []
    owners = Counter(id(p) for m in readouts.network.modules() for p in m._parameters.values())
    for name, module in readouts.network.named_modules():
        # A weight that is shared, or computed from others, cannot be changed.
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Conv2d) and weight is not None and owners[id(weight)] == 1:
            handles.append(module.register_forward_hook(record_output(name)))
        elif _foldable(module):
            handles.append(module.register_forward_pre_hook(record_input(name)))
    try:
        with uses:
            expected = _read(readouts, image)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(value) for value in expected.values()}
    pairs = []
    for batch_norm, inputs in batch_norm_inputs.items():
        convolutions = {producers.get(id(tensor)) for tensor in inputs}
        convolution = convolutions.pop()
        if convolutions or convolution is None or len(outputs[convolution]) != len(inputs):
            continue
        if all(uses.counts[id(tensor)] == 1 and id(tensor) not in returned for tensor in inputs):
            pairs.append((convolution, batch_norm))
    return pairs, expected


class _UseCounter(TorchDispatchMode):
    """Count the operations that use each tensor, by id. Tensors are kept so that no id is reused."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {id(value): value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        self.counts.update(list(used))
        self.kept += used.values()
        return func(*args, **(kwargs or {}))


def _fold(network: nn.Module, precise: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold the BatchNorms of `precise` into the convolutions of `network`, which has the same layers."""
    for convolution, batch_norm in pairs:
        target, conv, bn = (
            network.get_submodule(convolution),
            precise.get_submodule(convolution),
            precise.get_submodule(batch_norm),
        )
        assert isinstance(target, nn.Conv2d)
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None and bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        trains = target.weight.requires_grad
        target.weight, target.bias = (
            nn.Parameter(tensor.to(target.weight), requires_grad=trains) for tensor in (weight, bias)
        )
        norm = network.get_submodule(batch_norm)
        rest: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):  # timm's may have dropout and an activation
            rest = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))
        network.set_submodule(batch_norm, rest.eval())
