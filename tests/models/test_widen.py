"""Two linear layers while a network learns, one when it ships."""

import copy

import pytest
import torch
from questpress.models.build import build
from questpress.models.errors import ModelError
from questpress.models.readout import Readouts, Widened, merged, widen
from questpress.models.weights import classifier_weight
from torch import nn

NETWORKS = (
    "cifar_resnet8",
    "cifar_mobilenetv2_half",
    "mobilenetv3_small_050",
    "convnext_atto",
    "regnetx_002",
)
READS = frozenset({"map", "vector", "logits"})


def widened(name: str, width: int) -> nn.Module:
    """A widened network whose linear layers have learned something, in eval mode."""
    network = build(name, num_classes=5, image_size=32, seed=0).eval()
    widen(network, width, seed=1)
    generator = torch.Generator().manual_seed(2)
    classifier = network.get_classifier()
    assert isinstance(classifier, Widened)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [3, 2000])
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_network_is_the_plain_network(name: str, width: int, images: torch.Tensor) -> None:
    network = widened(name, width)
    plain = build(name, num_classes=5, image_size=32, seed=0)
    result = merged(network)
    with torch.no_grad():
        expected, output = network(images), result(images)
    assert torch.allclose(output, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert {key: value.shape for key, value in result.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in plain.parameters())
    assert isinstance(network.get_classifier(), Widened)  # the network in training is unchanged
    assert merged(result) is result


@pytest.mark.parametrize("name", NETWORKS)
def test_vector_is_the_projected_one(name: str, images: torch.Tensor) -> None:
    network = widened(name, 17)
    readouts = Readouts(network, 32)
    assert readouts.shapes.vector == 17 and readouts.classifier_reads_vector
    with torch.no_grad():
        outputs = readouts(images, READS)
        last = network.get_classifier().classifier
        assert torch.equal(last(outputs["vector"]), outputs["logits"])
        assert torch.allclose(outputs["logits"], network(images), atol=1e-5)
        plain = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(network.get_classifier().embed(plain.flatten(1)), outputs["vector"], atol=1e-6)


@pytest.mark.parametrize("width", [64, 100])
def test_projection_of_equal_width_is_the_identity(width: int, images: torch.Tensor) -> None:
    network = build("cifar_resnet8", num_classes=5, image_size=32, seed=0).eval()
    before = copy.deepcopy(network)
    widen(network, width, seed=1)
    with torch.no_grad():
        assert torch.allclose(network(images), before(images), atol=1e-5)


def test_start_follows_the_seed_alone() -> None:
    each = []
    for seed in (1, 1, 2):
        network = build("cifar_resnet8", num_classes=5, image_size=32, seed=0)
        before = torch.random.get_rng_state()
        widen(network, 9, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        each.append(network.get_classifier().embed.weight)
    assert torch.equal(each[0], each[1]) and not torch.equal(each[0], each[2])


def test_classifier_without_a_bias_is_merged_into_one_without() -> None:
    network = build("cifar_resnet8", num_classes=5, image_size=32, seed=0)
    network.fc = nn.Linear(64, 5, bias=False)
    widen(network, 9, seed=0)
    assert merged(network).fc.bias is None


def test_classifier_that_is_not_one_linear_on_the_vector_is_refused() -> None:
    with torch.device("meta"):
        readouts = Readouts(build("deit_tiny_distilled_patch16_224", num_classes=5), 224)
    with pytest.raises(ModelError, match="is not one linear layer on its penultimate vector"):
        readouts.check_widening()


def test_dropout_before_the_classifier_does_not_stand_in_the_way(images: torch.Tensor) -> None:
    network = build("ghostnet_050", num_classes=5, image_size=32, seed=0)
    assert network.drop_rate
    Readouts(network, 32).check_widening()
    widen(network, 9, seed=0)
    readouts = Readouts(network, 32).train()
    assert readouts.shapes.vector == 9
    outputs = readouts(images, READS)
    assert not torch.allclose(network.get_classifier().classifier(outputs["vector"]), outputs["logits"])
    with torch.no_grad():
        network.eval()
        assert torch.allclose(merged(network)(images), network(images), atol=1e-5)


def test_weight_of_a_classifier_is_found_and_none_where_there_is_none() -> None:
    weight = classifier_weight(build("mobilenetv3_small_050", num_classes=5, image_size=32, seed=0))
    assert weight is not None and weight.shape == (5, 1024)
    assert classifier_weight(build("cifar_resnet8", num_classes=0, image_size=32, seed=0)) is None


@torch.no_grad()
def test_cells_of_a_widened_network_are_those_of_the_merged_one(images: torch.Tensor) -> None:
    network = build("cifar_resnet8", num_classes=5, image_size=32, seed=0).eval()
    widen(network, 100, seed=0)
    read = frozenset({"cells"})
    cells, plain = (Readouts(net, 32)(images, read)["cells"] for net in (network, merged(network)))
    assert cells.shape == (len(images), 21, 5) and torch.allclose(cells, plain, atol=1e-5)
