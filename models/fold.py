"""BatchNorm of a frozen network, folded into the convolution before it.

In eval mode BatchNorm multiplies each channel by a constant and adds another. Right after a convolution both
can stand in that one's weights and bias: the same function, and one pass over the map less.

Pairs are found by watching the network compute, not by names: a BatchNorm whose input is, every time, the
very tensor that one convolution gave and that nothing else uses. Where that is not so (pre-activation,
DenseNet's concatenations, a map that is read before its BatchNorm) the BatchNorm stays. What watching cannot
see, such as a convolution that standardises its weights, the readouts tell: all must stay what they were.
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

from .readout import Readouts

TOLERANCE = 1e-9
"""Largest difference of a readout in float64, relative to its largest number; an exact folding has 1e-14."""

Pair = tuple[str, str]
"""Names of a convolution and of the BatchNorm after it."""


@torch.no_grad()
def fold_batch_norm(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the network in eval mode whose BatchNorms are folded, as far as its readouts stay the same.

    Args:
        network: a network that ``Readouts`` can read; it stays as it is.
        example: images [B,3,S,S] of the size that the network is used with; the first is looked at.

    Returns:
        The copy, on the network's device; folded weights are computed in float64 and rounded to the
        network's precision. Readouts agree with the network's within rounding.
    """
    folded = copy.deepcopy(network).eval()
    if not any(map(_foldable, folded.modules())):
        return folded
    # Float64, so that a difference is a mistake and never rounding; the CPU has it whatever the device.
    image = example[:1].detach().cpu().double()
    readouts = Readouts(copy.deepcopy(network).eval().cpu(), image_size=image.shape[-1]).double()
    precise = readouts.network
    pairs, expected = _watch(readouts, image)
    weights = {id(one): one for one in (*precise.parameters(), *precise.buffers())}

    def same(tried: Sequence[Pair]) -> bool:
        attempt = copy.deepcopy(readouts, dict(weights))  # folding replaces weights and changes none
        _fold(attempt.network, precise, tried)
        try:
            return _agree(_read(attempt, image), expected)
        except Exception:  # a network that looks at its BatchNorm's own attributes cannot do without it
            return False

    _fold(folded, precise, _largest(pairs, same))
    return folded


def _foldable(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm with fixed statistics: torch's, or timm's with an activation."""
    forwards = (nn.BatchNorm2d.forward, BatchNormAct2d.forward)
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward in forwards
        and module.running_mean is not None
        and module.running_var is not None
    )


def _read(readouts: Readouts, image: Tensor) -> dict[str, Tensor]:
    """Everything the network tells, by both of the ways in which it is asked."""
    return {**readouts(image, readouts.offers), "forward": readouts.network(image)}


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        bool((found[read] - value).abs().max() <= TOLERANCE * value.abs().max())
        for read, value in expected.items()
    )


def _largest(pairs: Sequence[Pair], same: Callable[[Sequence[Pair]], bool]) -> list[Pair]:
    """As many of the pairs as can be folded, found by halving where not all can."""
    if not pairs or same(pairs):
        return list(pairs)
    if len(pairs) == 1:
        return []
    middle = len(pairs) // 2
    first, second = _largest(pairs[:middle], same), _largest(pairs[middle:], same)
    # Each half is right on its own; together they are, unless they touch each other.
    return [*first, *second] if same([*first, *second]) else first


def _watch(readouts: Readouts, image: Tensor) -> tuple[list[Pair], dict[str, Tensor]]:
    """The pairs that can be folded as far as watching tells, in order, and the readouts unfolded."""
    uses = _Uses()
    given_by: dict[int, str] = {}
    gave: dict[str, list[Tensor]] = defaultdict(list)
    got: dict[str, list[Tensor]] = defaultdict(list)

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            gave[name].append(output)
            given_by[id(output)] = name

        return hook

    def before(name: str) -> Any:
        return lambda _module, inputs: got[name].append(inputs[0])

    handles = []
    owners = Counter(id(p) for m in readouts.network.modules() for p in m._parameters.values())
    for name, module in readouts.network.named_modules():
        # A weight that another module has too, or that is computed from others, is not there to be changed.
        own = module._parameters.get("weight") is not None and owners[id(module._parameters["weight"])] == 1
        if isinstance(module, nn.Conv2d) and own:
            handles.append(module.register_forward_hook(after(name)))
        elif _foldable(module):
            handles.append(module.register_forward_pre_hook(before(name)))
    try:
        with uses:
            expected = _read(readouts, image)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(value) for value in expected.values()}
    pairs = []
    for batch_norm, inputs in got.items():
        convolutions = {given_by.get(id(one)) for one in inputs}
        convolution = convolutions.pop()
        if convolutions or convolution is None or len(gave[convolution]) != len(inputs):
            continue
        if all(uses.of[id(one)] == 1 and id(one) not in returned for one in inputs):
            pairs.append((convolution, batch_norm))
    return pairs, expected


class _Uses(TorchDispatchMode):
    """Counts the operations that take each tensor; tensors are kept, so that no other gets their identity."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {id(one): one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        self.of.update(list(taken))
        self.kept += taken.values()
        return func(*args, **(kwargs or {}))


def _fold(network: nn.Module, precise: nn.Module, pairs: Sequence[Pair]) -> None:
    """Put the BatchNorms of ``precise`` into the convolutions of ``network``, which has the same layers."""
    for convolution, batch_norm in pairs:
        into, conv, bn = (
            network.get_submodule(convolution),
            precise.get_submodule(convolution),
            precise.get_submodule(batch_norm),
        )
        assert isinstance(conv, nn.Conv2d) and isinstance(into, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None and bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        trains = into.weight.requires_grad
        into.weight, into.bias = (
            nn.Parameter(one.to(into.weight), requires_grad=trains) for one in (weight, bias)
        )
        network.set_submodule(batch_norm, _rest(network.get_submodule(batch_norm)))


def _rest(batch_norm: nn.Module) -> nn.Module:
    """What a BatchNorm does besides: timm's may drop and activate."""
    if isinstance(batch_norm, BatchNormAct2d):
        return nn.Sequential(OrderedDict(drop=batch_norm.drop, act=batch_norm.act)).eval()
    return nn.Identity().eval()
