"""A folded temperature divides the logits and changes no prediction, whatever the network's last layer is."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from questpress.export import runtime
from questpress.export.conversion.onnx_export import (
    TemperatureScaled,
    check_parity,
    export_onnx,
    fold_temperature,
)
from torch import nn

from tests.support.networks import LABELS, PREPROCESSING

IMAGES = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32))


class WithHead(nn.Module):
    """A network whose classifier is ``head``, with whatever comes ``after`` it."""

    def __init__(self, head: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = head
        self.after = after or nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vector = self.stem(x)
        if not isinstance(self.head, nn.Conv2d):
            vector = vector.flatten(1)
        return self.after(self.head(vector)).flatten(1)


class Standardized(nn.Linear):
    """A layer whose weight's scale does not count."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(IMAGES)


@pytest.mark.parametrize("head", [nn.Linear(8, 5), nn.Conv2d(8, 5, 1), nn.Linear(8, 5, bias=False)])
def test_linear_or_convolutional_last_layer_takes_the_temperature(head):
    network = WithHead(head)
    before, weights = logits(network), {k: v.clone() for k, v in network.state_dict().items()}
    folded, place = fold_temperature(network, 1.7, IMAGES)
    assert place == "last layer" and type(folded) is WithHead
    assert torch.allclose(logits(folded) * 1.7, before, atol=1e-6)
    assert torch.equal(logits(folded).argmax(1), before.argmax(1))
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items()), "a copy was changed"


@pytest.mark.parametrize(
    "network",
    [
        WithHead(nn.Linear(8, 5), nn.LayerNorm(5)),
        WithHead(nn.Linear(8, 5), nn.Linear(5, 5)),
        WithHead(Standardized(8, 5)),
        WithHead(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)),
    ],
    ids=["norm after", "layer after", "standardized", "no plain layer", "no get_classifier"],
)
def test_temperature_divides_logits_after_other_last_layers(network):
    before = logits(network)
    folded, place = fold_temperature(network, 0.4, IMAGES)
    assert place == "after the logits" and isinstance(folded, TemperatureScaled)
    assert torch.allclose(logits(folded) * 0.4, before, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resnet10t", "last layer"),
        ("mobilenetv3_small_050", "last layer"),
        ("vit_tiny_patch16_224", "last layer"),
        ("nf_regnet_b0", "last layer"),
        ("resnetv2_50", "last layer"),
        ("levit_128s", "after the logits"),
        ("deit_tiny_distilled_patch16_224", "after the logits"),
    ],
)
def test_temperature_works_for_timm_families(name, place):
    size = {"levit_128s": 224}.get(name, 64)
    options = {"img_size": size} if "vit_" in name or "deit" in name else {}
    network = timm.create_model(name, num_classes=7, **options).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folded, actual = fold_temperature(network, 2.3, images)
        before, after = network(images), folded(images)
    assert actual == place
    assert torch.allclose(after * 2.3, before, atol=1e-4 * float(before.abs().max()) + 1e-7)


@pytest.mark.parametrize("plain", [True, False])
def test_exported_file_divides_too_and_is_checked_against_the_folded_network(plain, tmp_path: Path):
    network = WithHead(nn.Linear(8, 3), None if plain else nn.LayerNorm(3)).eval()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    folded, place = fold_temperature(network, 3.0, images)
    assert place == ("last layer" if plain else "after the logits")
    file = tmp_path / "student.onnx"
    export_onnx(folded, file, 8, metadata=runtime.build_metadata(PREPROCESSING, LABELS, {"temperature": 3.0}))
    check_parity(folded, file, images)
    outputs = runtime.Classifier.load(file).logits(images.numpy())
    with torch.no_grad():
        before = network(images).numpy()
    assert np.allclose(outputs * 3, before, atol=1e-5) and (outputs.argmax(1) == before.argmax(1)).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match="positive"):
        fold_temperature(WithHead(nn.Linear(8, 5)), temperature, IMAGES)
