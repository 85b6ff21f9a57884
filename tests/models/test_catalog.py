import time

import pytest
from questpress.models.catalog import describe


def test_parameters_and_multiply_adds_are_the_published_ones():
    entry = describe("resnet50")
    assert entry.parameters == 25_557_032 and entry.gmacs == pytest.approx(4.089, abs=0.001)
    assert entry.image_size == 224 and entry.license == "apache-2.0" and entry.has_weights


def test_multiply_adds_follow_the_image_size_and_an_alias_is_named_next_to_its_model():
    entry = describe("mobilenetv2", 448)
    assert (entry.alias, entry.name) == ("mobilenetv2", "mobilenetv2_100")
    whole = describe("mobilenetv2").gmacs
    assert whole == pytest.approx(0.3008, abs=0.001)
    classifier = 1280 * 1000 / 1e9  # costs the same at any size
    assert entry.gmacs - classifier == pytest.approx(4 * (whole - classifier), rel=0.001)


def test_convolution_is_counted_as_by_hand():
    entry = describe("cifar_vgg8")
    sides, pairs = (32, 16, 8, 4, 4), ((3, 64), (64, 128), (128, 256), (256, 512), (512, 512))
    by_hand = sum(side**2 * 9 * a * b for side, (a, b) in zip(sides, pairs, strict=True)) + 512 * 100
    assert entry.gmacs == pytest.approx(by_hand / 1e9)
    assert not entry.has_weights and entry.license is None


def test_large_network_is_described_in_no_time_and_without_its_memory():
    describe("resnet18")
    started = time.monotonic()
    entry = describe("vit_giant_patch14_dinov2", 224)
    assert entry.parameters > 1e9 and time.monotonic() - started < 10
