"""Peak FLOP/s, utilization and peak memory."""

import pytest
import torch
from questpress.models.catalog import describe, multiply_adds
from questpress.pipeline.training.metrics import peak_flops, peak_flops_by_name, peak_memory, utilization


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GH200 480GB", 990, 67),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA A10", 125, 31.2),
        ("Tesla T4", None, 8.1),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ],
)
def test_peak_of_a_gpu_is_that_of_its_data_sheet(name, bf16, fp32):
    assert peak_flops_by_name(name, "bf16", tf32=False) == (
        None if bf16 is None else pytest.approx(1e12 * bf16)
    )
    assert peak_flops_by_name(name, "fp32", tf32=False) == pytest.approx(1e12 * fp32)


def test_tf32_peak_is_used_for_tf32_convolutions():
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156e12
    assert peak_flops_by_name("Tesla T4", "fp32", tf32=True) == 8.1e12
    assert peak_flops_by_name("Tesla T4", "fp16", tf32=False) == 65e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "GRID A100-10C",
        "NVIDIA H100 80GB HBM2e",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_unknown_device_has_no_peak(name):
    assert peak_flops_by_name(name, "bf16", tf32=False) is None


def test_cpu_has_no_peak_and_no_utilization():
    assert peak_flops("cpu", "bf16") is None and peak_flops("mps", "fp32") is None
    assert utilization(1000, 0.3, [4.1], peak_flops("cpu", "fp32")) is None


def test_peak_depends_on_the_device_and_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        assert peak_flops("cuda:0", "bf16") == 989.5e12 and peak_flops("cuda", "fp32") == 494.5e12
        convolutions.fp32_precision = "ieee"
        assert peak_flops("cuda", "fp32") == 67e12
    finally:
        convolutions.fp32_precision = before


def test_utilization_equals_manual_computation():
    # 10,000 images/s × (6 × 0.3 G + 2 × 4.1 G) = 100 TFLOP/s, of 200.
    assert utilization(10_000, 0.3, [4.1], 200e12) == pytest.approx(0.5)
    assert utilization(10_000, 0.3, [4.1], 200e12, devices=2) == pytest.approx(0.25)
    stored = utilization(10_000, 0.3, [], 200e12)
    assert stored == pytest.approx(0.09)
    assert utilization(10_000, None, [], 200e12) is None
    assert utilization(10_000, 0.3, [None], 200e12) is None


def test_multiply_adds_depend_on_the_number_of_classes():
    whole = describe("mobilenetv2_100", 64).gmacs
    few = multiply_adds("mobilenetv2", 64, 10)
    assert whole is not None and few is not None
    assert whole - few == pytest.approx(1280 * 990 / 1e9)


def test_peak_memory_is_in_bytes_and_never_falls():
    before = peak_memory("cpu")
    if before is None:
        pytest.skip("peak memory is not available on this system")
    block = bytearray(before + 50_000_000)  # more than there ever was
    block[::4096] = b"\1" * len(block[::4096])
    after = peak_memory("cpu")
    del block
    assert after is not None and after > before + 40_000_000
    assert 50_000_000 < before < 1e12
    later = peak_memory("cpu")
    assert later is not None and later >= after
