"""A target's types are in its files; a machine knows its target and takes the file that is right for it."""

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from questpress.export import runtime
from questpress.export.artifact import ShippedFile, write_manifest
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.errors import ExportError
from questpress.export.int8 import targets
from questpress.export.int8.quantizer import prepare
from questpress.export.int8.targets import TARGETS, explain_untimed, find_target, is_exact_here
from questpress.export.latency import machine

from tests.support.graphs import constants, graph_of, prepared, weights
from tests.support.networks import (
    LABELS,
    PREPROCESSING,
    color_classifier,
    images,
    onnx_file,
    quantize_int8,
    small_conv_net,
)

VNNI = ("x86_64", "flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\n")
NO_VNNI = ("x86_64", "flags\t\t: fpu sse2 avx2 avx512f\n")
ARM = ("aarch64", "Features\t: fp asimd asimddp i8mm\n")


def pretend(monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str | None]) -> None:
    """Be another machine: of this architecture, with this /proc/cpuinfo, or none."""
    architecture, text = kind
    read = Path.read_text

    def faked(self: Path, *arguments: object, **options: object) -> str:
        if self != Path("/proc/cpuinfo"):
            return read(self, *arguments, **options)  # type: ignore[arg-type]
        if text is None:
            raise FileNotFoundError(self)
        return f"processor\t: 0\nmodel name\t: Some CPU\n{text}processor\t: 1\nmodel name\t: Another\n"

    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(Path, "read_text", faked)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "small.onnx"
    return export_onnx(small_conv_net(), path, 16, metadata={}).path


@pytest.mark.parametrize(
    ("name", "activations", "most"),
    [("x86", np.uint8, 64), ("x86-vnni", np.uint8, 127), ("arm64", np.int8, 127)],
)
def test_zero_points_and_weights_have_the_targets_types(
    fp32: Path, tmp_path: Path, name: str, activations: type, most: int
) -> None:
    file = quantize_int8(fp32, tmp_path / "a.onnx", [images(16)], target_name=name)
    model = onnx.load(str(file.path))
    held = constants(model)
    nodes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert nodes and {held[n.input[2]].dtype for n in nodes} == {np.dtype(activations)}
    ends = {int(held[n.input[2]]) for n in nodes}
    assert np.iinfo(activations).min in ends  # ReLU6's: 0 is the lowest level, none is given away below it
    products = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    integer = [dequantized[n.input[1]] for n in products if n.input[1] in dequantized]
    assert len(integer) == (4 if name == "arm64" else 3)
    for node in integer:
        weight, scale, zero = (held[part] for part in node.input)
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert weight.dtype == np.int8 and scale.shape == (weight.shape[axis],) and not zero.any()
        largest = np.abs(weight.astype(int)).max(axis=tuple(d for d in range(weight.ndim) if d != axis))
        assert (largest == most).all()  # of each channel
    assert file.recipe["target"] == name
    assert file.recipe["reduce_range"] == (name == "x86")


def test_each_target_has_its_types() -> None:
    assert list(TARGETS) == ["x86", "x86-vnni", "arm64"]
    assert find_target("arm64").described == {
        "activations": "int8 asymmetric",
        "weights": "int8 symmetric per channel",
        "reduce_range": False,
    }
    assert find_target("x86").described["activations"] == "uint8 asymmetric"


def test_unknown_target_is_refused_with_the_choices(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^Unknown target 'riscv'\. Choose from x86, x86-vnni, arm64\.$"):
        quantize_int8(fp32, tmp_path / "a.onnx", [images(8)], target_name="riscv")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (VNNI, "x86-vnni"),
        (("AMD64", "flags : avx2 avx_vnni\n"), "x86-vnni"),
        (NO_VNNI, "x86"),
        (("x86_64", "flags : avx512_vnnix\nbugs : avx512_vnni\n"), "x86"),
        (("AMD64", None), "x86"),
        (ARM, "arm64"),
        (("arm64", None), "arm64"),
    ],
)
def test_target_is_detected(monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str | None], name: str) -> None:
    pretend(monkeypatch, kind)
    assert runtime.detect_target() == name


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        (("aarch64", "Features\t: fp asimd evtstrm aes crc32 cpuid\n"), True),  # Cortex-A72
        (ARM, False),
        (("arm64", None), False),
        (("aarch64", ""), False),
        (NO_VNNI, False),
    ],
)
def test_dot_products_of_arm_are_detected(
    monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str | None], lacks: bool
) -> None:
    pretend(monkeypatch, kind)
    assert runtime.lacks_dot_products() == lacks


def test_environment_names_the_processor_and_its_int8_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, VNNI)
    here = machine.environment()
    assert here.cpu == "Some CPU" and here.machine.endswith(" x86_64")
    assert {"avx512_vnni", "amx_int8"} <= set(here.flags) and "sse2" not in here.flags
    assert here.cores == runtime.allowed_cores()


@pytest.mark.parametrize(
    ("kind", "timed", "right"),
    [
        (NO_VNNI, {"x86"}, {"x86"}),
        (VNNI, {"x86", "x86-vnni"}, {"x86", "x86-vnni", "arm64"}),
        (ARM, {"arm64"}, {"x86", "x86-vnni", "arm64"}),
    ],
)
def test_timed_and_exact_targets_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str], timed: set[str], right: set[str]
) -> None:
    pretend(monkeypatch, kind)
    reasons = explain_untimed(TARGETS)
    assert {name for name, reason in reasons.items() if reason is None} == timed
    here = runtime.detect_target()
    for name, reason in reasons.items():
        assert reason in (None, f"made for {name}, this machine is {here}")
    assert {name for name in TARGETS if is_exact_here(name)} == right
    assert targets.explain_untimed([]) == {}


def artifact(folder: Path, *int8: tuple[str, str | None]) -> Path:
    """An artifact folder of one fp32 file and int8 files, named and for a target each."""
    folder.mkdir()
    files = [
        ShippedFile(onnx_file(color_classifier(folder / name)), precision, target=target)
        for name, precision, target in [("student.onnx", "fp32", None), *((n, "int8", t) for n, t in int8)]
    ]
    write_manifest(folder, files=files, preprocessing=PREPROCESSING, labels=LABELS, origin={})
    return folder


THREE = (
    ("student.int8.onnx", "x86-vnni"),
    ("student.int8.x86.onnx", "x86"),
    ("student.int8.arm64.onnx", "arm64"),
)


@pytest.mark.parametrize(
    ("kind", "files", "taken"),
    [
        (VNNI, THREE, "student.int8.onnx"),
        (NO_VNNI, THREE, "student.int8.x86.onnx"),
        (ARM, THREE, "student.int8.arm64.onnx"),
        (VNNI, THREE[1:], "student.int8.x86.onnx"),
        (VNNI, THREE[::-1], "student.int8.onnx"),
        (NO_VNNI, THREE[:1], "student.onnx"),
        (NO_VNNI, (THREE[0], THREE[2]), "student.onnx"),
        (ARM, THREE[:2], "student.onnx"),
        (VNNI, THREE[2:], "student.onnx"),
        (ARM, (("any.onnx", None), *THREE[:2]), "any.onnx"),
        (VNNI, (("x.onnx", "x86"), ("any.onnx", None)), "x.onnx"),
        (NO_VNNI, (), "student.onnx"),
    ],
)
def test_runtime_takes_the_file_of_this_processor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, str],
    files: tuple[tuple[str, str | None], ...],
    taken: str,
) -> None:
    folder = artifact(tmp_path / "artifact", *files)
    pretend(monkeypatch, kind)
    assert runtime.Classifier.load(folder).name == taken
    assert runtime.Classifier.load(folder, precision="fp32").name == "student.onnx"


def test_file_given_by_name_loads_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path / "artifact", *THREE)
    pretend(monkeypatch, NO_VNNI)
    for name, _ in THREE:
        assert runtime.Classifier.load(folder, file=name).name == name
    with pytest.raises(
        runtime.ArtifactError, match=r"contains no student\.int8\.mips\.onnx\. Its manifest lists student"
    ):
        runtime.Classifier.load(folder, file="student.int8.mips.onnx")


def test_stem_is_a_small_first_convolution_of_the_input_alone(fp32: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["input", "small"], ["a"], name="small", pads=[1, 1, 1, 1]),
        node("Conv", ["input", "large"], ["b"], name="large", pads=[3, 3, 3, 3]),
        node("Conv", ["a", "later"], ["c"], name="later", pads=[1, 1, 1, 1]),
        node("Add", ["b", "c"], ["output"], name="sum"),
    ]
    kernels = {"small": weights(3, 3, 3, 3), "large": weights(3, 3, 7, 7), "later": weights(3, 3, 3, 3)}
    x86, vnni, arm = map(find_target, TARGETS)
    assert prepared(graph_of(nodes, kernels)).stem(x86) == ("small",)
    deep = [node("Conv", ["input", "w"], ["output"], name="deep")]
    assert prepared(graph_of(deep, {"w": weights(4, 8, 3, 3)}, given=("batch", 8, 8, 8))).stem(x86) == ()
    ready = prepare(fp32)
    (name,) = ready.stem(x86)
    assert (ready.model.graph.node[0].name, ready.model.graph.node[0].op_type) == (name, "Conv")
    assert ready.stem(vnni) == (name,) and ready.stem(arm) == ()
