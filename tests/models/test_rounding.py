"""Weights that are rounded to bf16 once give the bits of autocast, which rounds them in each pass."""

import copy

import pytest
import torch
from questpress.models.build import build
from questpress.models.fold import fold_batch_norm
from questpress.models.readout import Readouts
from questpress.models.rounding import RoundedConv2d, round_weights

from tests.support.operations import Operations

# edgenext reads the type of a weight for its position encoding.
FAMILIES = {"cifar_resnet8": 32, "test_efficientnet": 32, "test_vit": 32, "edgenext_xx_small": 64}


@pytest.mark.parametrize("name", FAMILIES)
def test_rounded_weights_give_equal_bits_with_fewer_operations(name: str) -> None:
    size = FAMILIES[name]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = fold_batch_norm(build(name, num_classes=4, image_size=size, seed=0), images)
    plain = Readouts(network, size).requires_grad_(False)
    rounded = copy.deepcopy(plain)
    round_weights(rounded)
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    reads = frozenset({"map", "logits"})
    counts = []
    with torch.no_grad():
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                expected = plain(images, reads)
                with Operations() as count:
                    outputs = rounded(images, reads)
                counts.append(count.counts)
            for read, value in expected.items():
                assert outputs[read].dtype == value.dtype and torch.equal(outputs[read], value)
        with torch.autocast("cpu", torch.bfloat16), Operations() as before:
            plain(images, reads)
    layers = [module for module in rounded.modules() if hasattr(module, "rounded_weight")]
    tensors = sum(1 + (layer.rounded_bias is not None) for layer in layers)
    saved = before.counts["_to_copy"] - counts[0]["_to_copy"]
    assert saved == tensors > 0


def test_rounded_weights_move_with_the_network() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    round_weights(network)
    [layer] = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert isinstance(layer, RoundedConv2d)
    assert layer.rounded_weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.to("meta").rounded_weight.is_meta
