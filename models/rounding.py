"""Round the weights of a frozen network to 16 bits once, instead of in each forward pass under autocast.

Autocast keeps rounded weights only if they require a gradient. A rounded network returns the same bits: its
layers compute with the same rounded weights, and only under autocast. ``weight`` itself stays in fp32, since
some networks read its values or its type elsewhere.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Rounded(nn.Module):
    """A layer that has its weights in 16 bits, too, and computes with them under autocast."""

    _compute: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return self._compute(input, self.rounded_weight, self.rounded_bias)


class RoundedConv2d(_Rounded, nn.Conv2d):
    _compute = nn.Conv2d._conv_forward


class RoundedLinear(_Rounded, nn.Linear):
    _compute = staticmethod(F.linear)


ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: RoundedConv2d, nn.Linear: RoundedLinear}


def round_weights(network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Add copies of the weights in ``dtype``, that of autocast, to plain convolutions and linear layers.

    They are not saved.
    """
    for module in list(network.modules()):
        # A weight that is computed from others is not a parameter.
        if type(module) not in ROUNDED or module._parameters.get("weight") is None:
            continue
        for name in ("weight", "bias"):
            value = getattr(module, name)
            rounded = None if value is None else value.detach().to(dtype)
            module.register_buffer(f"rounded_{name}", rounded, persistent=False)
        module.__class__ = ROUNDED[type(module)]
