"""Compiled readouts are the same readouts, of a network that stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from questpress.models.build import build
from questpress.models.readout import Readouts

FAMILIES = {"cifar_resnet8": 16, "cifar_vgg8": 32, "test_vit": 32, "test_convnext": 32}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str | None]]:
    """Functions that were given to torch.compile, which captures graphs but does not generate code here."""
    compiled: list[tuple[Any, str | None]] = []
    original = torch.compile

    def compile(function: Callable[..., Any], *, dynamic: bool, mode: str | None) -> Any:
        compiled.append((function, mode))
        assert dynamic is False
        return original(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    return compiled


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_readouts_and_their_gradients_are_the_uncompiled_ones(name: str, captured: Any) -> None:
    size = FAMILIES[name]
    readouts = Readouts(build(name, num_classes=4, image_size=size, seed=0), size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    names = set(readouts.state_dict())
    results = []
    for mode in (None, "default"):
        network = copy.deepcopy(readouts).train()
        network.compile_features(mode)
        assert set(network.state_dict()) == names
        for reads in ({"logits"}, {"map", "map@0", "vector", "logits"}):
            outputs = network(images, frozenset(reads))
            sum(value.square().mean() for value in outputs.values()).backward()
        gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        results.append((outputs, gradients, dict(network.named_buffers())))
    assert [mode for _, mode in captured] == ["default", "default"]
    for plain, compiled in zip(*results, strict=True):
        assert plain.keys() == compiled.keys()
        for key in plain:
            torch.testing.assert_close(plain[key], compiled[key], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("captured")
def test_loss_on_the_logits_has_its_gradient_at_a_compiled_networks_map() -> None:
    readouts = Readouts(build("cifar_resnet8", num_classes=4, image_size=16, seed=0), 16)
    readouts.compile_features("default")
    outputs = readouts(torch.randn(2, 3, 16, 16), frozenset({"map", "logits"}))
    [gradient] = torch.autograd.grad(outputs["logits"].logsumexp(1).sum(), outputs["map"], allow_unused=True)
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.usefixtures("captured")
def test_copy_computes_uncompiled_and_with_its_own_weights() -> None:
    readouts = Readouts(build("cifar_resnet8", num_classes=4, image_size=16, seed=0).eval(), 16)
    readouts.compile_features("default")
    other = copy.deepcopy(readouts)
    assert readouts.compiled and not other.compiled
    with torch.no_grad():
        for parameter in readouts.parameters():
            parameter.zero_()
        images = torch.randn(2, 3, 16, 16)
        reads = frozenset({"map", "logits"})
        assert readouts(images, reads)["map"].abs().sum() == 0
        assert other(images, reads)["map"].abs().sum() > 0


@pytest.mark.usefixtures("captured")
def test_network_is_uncompiled_without_a_mode() -> None:
    readouts = Readouts(build("cifar_resnet8", num_classes=4, image_size=16, seed=0), 16)
    readouts.compile_features("default")
    readouts.compile_features(None)
    assert not readouts.compiled
    bare = Readouts(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), 4)
    bare.compile_features("default")
    assert not bare.compiled and bare(torch.zeros(1, 3, 4, 4))["logits"].shape == (1, 2)
