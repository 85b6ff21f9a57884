import numpy as np
import pytest
import torch
from questpress.models.build import build, check_size, default_image_size, fits_bf16, geometry
from questpress.models.errors import ModelError, UnknownModel
from questpress.models.readout import Readouts


def test_seed_decides_the_weights_and_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build("cifar_resnet8", num_classes=5, image_size=32, seed=7)
    assert torch.equal(torch.rand(4), expected)
    second = build("cifar_resnet8", num_classes=5, image_size=32, seed=7)
    other = build("cifar_resnet8", num_classes=5, image_size=32, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_geometry_is_the_networks_own_and_the_image_size_can_be_changed():
    own = geometry("resnet18.a1_in1k")
    assert (own.image_size, own.crop_fraction) == (224, 0.95)
    assert (own.interpolation, own.crop_mode) == ("bicubic", "center")
    np.testing.assert_allclose(own.mean, (0.485, 0.456, 0.406))
    changed = geometry("resnet18.a1_in1k", 64)
    assert changed.image_size == 64 and changed.crop_fraction == own.crop_fraction
    assert default_image_size("cifar_wrn_16_2") == 32


def test_cifar_networks_state_the_benchmarks_normalization_and_the_zero_padded_ones_imagenets():
    crd = geometry("cifar_resnet56")
    assert crd.mean == (0.5071, 0.4867, 0.4408) and crd.std == (0.2675, 0.2565, 0.2761)
    assert (crd.image_size, crd.crop_fraction) == (32, 1.0)
    padded = geometry("cifar_resnet56_a")
    assert padded.mean == (0.485, 0.456, 0.406) and padded.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenetv2_050", 64),
        ("test_vit", 64),
        ("vit_tiny_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 96),
    ],
)
def test_networks_are_built_for_the_image_size(name, size):
    check_size(name, size)
    network = build(name, num_classes=3, image_size=size, seed=0).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, size, size)).shape == (2, 3)
    assert network.built_as.image_size == size


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_xxs"])
def test_networks_are_built_for_rectangles(name):
    check_size(name, (64, 32))
    network = build(name, num_classes=3, image_size=(64, 32)).eval()
    features = Readouts(network)
    assert features.shapes.map is not None and features.shapes.map[1:] == (
        (4, 2) if name.startswith("vit") else (2, 1)
    )
    assert network(torch.zeros(1, 3, 64, 32)).shape == (1, 3)


def test_rectangle_that_does_not_fit_is_refused_with_the_next_ones():
    with pytest.raises(ModelError, match=r"16 pixels, which do not divide 96x36\. Use 96x32 or 96x48"):
        check_size("vit_tiny_patch16_224", (96, 36))
    with pytest.raises(ModelError, match=r"does not support images of 96x40 pixels\. Use "):
        check_size("crossvit_tiny_240", (96, 40))


def test_network_without_a_head_gives_its_vector():
    network = build("cifar_resnet8", num_classes=0, image_size=32).eval()
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_image_size_that_patches_do_not_divide_is_refused_with_the_next_ones():
    for refuse in (
        lambda: check_size("vit_tiny_patch16_224", 100),
        lambda: build("vit_tiny_patch16_224", num_classes=2, image_size=100),
    ):
        with pytest.raises(ModelError, match="96 or 112"):
            refuse()


def test_patches_of_a_mixer_and_of_a_hybrid_are_known_too():
    with pytest.raises(ModelError, match="64 or 96"):
        check_size("mixer_s32_224", 80)
    with pytest.raises(ModelError, match="96 or 112"):
        check_size("xcit_nano_12_p16_224", 100)
    check_size("pvt_v2_b0", 96)  # its patches overlap


def test_network_that_cannot_run_at_a_size_names_one_at_which_it_can():
    with pytest.raises(ModelError, match="240"):
        check_size("crossvit_tiny_240", 96)
    with pytest.raises(ModelError, match="positive"):
        check_size("resnet18", 0)
    check_size("resnet18", 31)


def test_wrong_name_is_refused_before_anything_is_built():
    with pytest.raises(UnknownModel):
        build("resnet5O", num_classes=2, image_size=32)
    with pytest.raises(UnknownModel):
        geometry("resnet5O")


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("resnet18", 16, False),
        ("resnet18", 17, True),
        ("resnet18", (16, 64), False),
        ("cifar_resnet8", 8, True),
        ("retinanet:resnet18", 64, False),  # its last level has a stride of 128
        ("retinanet:resnet18", 96, True),
    ],
)
def test_strided_convolutions_of_single_pixels_are_found(name, size, fits):
    assert fits_bf16(name, size) is fits
