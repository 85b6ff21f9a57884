"""A file that takes pixels predicts as one that takes normalized floats, at the borders too, also in int8."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from questpress.export import runtime
from questpress.export.artifact import ShippedFile, write_manifest
from questpress.export.conversion.onnx_export import check_parity, export_onnx
from questpress.export.conversion.pixel_input import PIXELS, Folded, Outside, attach, load_front, split
from questpress.export.errors import ExportError
from torch import nn

from tests.support.networks import onnx_file, quantize_int8, signal_to_noise, small_conv_net

IMAGENET = runtime.Preprocessing.create(
    32, 1.0, "bilinear", "squash", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
LABELS = ["a", "b", "c", "d"]


class TwoBranches(nn.Module):
    """The input feeds two convolutions, of which one sees padding."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, 2, 1)
        self.narrow = nn.Conv2d(3, 8, 1, 2)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier((self.wide(x) + self.narrow(x)).relu().mean((2, 3)))


def classifier(*stem: nn.Module) -> nn.Module:
    """A classifier of four classes behind a stem of eight channels."""
    return nn.Sequential(*stem, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def mirrored() -> nn.Module:
    return classifier(nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"))


def space_to_depth() -> nn.Module:
    return classifier(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, 1, 1))


def of_timm(name: str, **more: Any) -> nn.Module:
    return timm.create_model(name, num_classes=4, **more)


def pictures(size: int) -> np.ndarray:
    """Noise, black, white, and frames of one pixel, uint8 [n, S, S, 3]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, size, size, 3)).astype(np.uint8)
    images[0], images[1], images[2, 1:-1, 1:-1], images[3, 1:-1, 1:-1] = 0, 255, 0, 255
    images[4] = 114
    images[4, :, -1] = [255, 0, 90]
    return images


def logits(path: Path, batch: np.ndarray) -> np.ndarray:
    return runtime.open_session(path, 1).run(None, {"input": batch})[0]


def both(
    network: nn.Module, folder: Path, size: int, p: runtime.Preprocessing = IMAGENET
) -> tuple[Path, Path]:
    """The same network in a file that takes floats, and in one that takes pixels."""
    of_floats, of_pixels = folder / "floats.onnx", folder / "pixels.onnx"
    export_onnx(network, of_floats, size, metadata=runtime.build_metadata(p, LABELS, {}))
    about = runtime.build_metadata(p, LABELS, {}, takes_pixels=True)
    export_onnx(network, of_pixels, size, metadata=about, pixels=p)
    return of_floats, of_pixels


def maps_of_first_layer(path: Path, batch: np.ndarray) -> list[np.ndarray]:
    """What the first convolutions give, whole."""
    model = onnx.load(str(path))
    taken = {model.graph.input[0].name}
    names = []
    for node in model.graph.node:
        if node.op_type == "Conv" and taken & {node.input[0]}:
            names.append(node.output[0])
        elif taken & set(node.input):
            taken |= set(node.output)
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    return ort.InferenceSession(model.SerializeToString()).run(None, {"input": batch})


FOLDED = {
    "efficientnet": (lambda: of_timm("test_efficientnet"), 32, 4),
    "without padding": (lambda: classifier(nn.Conv2d(3, 8, 3, 2, 0)), 32, 3),
    "two branches": (TwoBranches, 32, 4),
    "padded as in TensorFlow": (lambda: of_timm("test_efficientnet", pad_type="same"), 33, 4),
    "the same, unevenly": (lambda: of_timm("test_efficientnet", pad_type="same"), 32, 4),
    "patches": (lambda: of_timm("vit_tiny_patch16_224", img_size=32, depth=2), 32, 3),
}


@pytest.mark.parametrize("name", FOLDED)
def test_pixel_input_folded_into_the_first_convolution_is_exact(name: str, tmp_path: Path) -> None:
    make, size, channels = FOLDED[name]
    torch.manual_seed(0)
    of_floats, of_pixels = both(make().eval(), tmp_path, size)
    shown = pictures(size)
    normalized = runtime.normalize(shown, IMAGENET)
    front = load_front(of_pixels)
    assert isinstance(front, Folded) and front.channels == channels
    np.testing.assert_allclose(logits(of_pixels, shown), logits(of_floats, normalized), atol=1e-4, rtol=0)
    ours, theirs = maps_of_first_layer(of_pixels, shown), maps_of_first_layer(of_floats, normalized)
    assert len(ours) == len(theirs) > 0
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    types = [node.op_type for node in onnx.load(str(of_pixels)).graph.node]
    assert types.count("Pad") == (channels == 4)


@pytest.mark.parametrize(("mean", "mask"), [((0.0, 0.0, 0.0), False), ((1.0, 1.0, 0.9), True)])
def test_any_mean_is_folded_exactly(mean: tuple[float, float, float], mask: bool, tmp_path: Path) -> None:
    p = runtime.Preprocessing.create(16, 1.0, "bilinear", "squash", mean=mean, std=(0.5, 0.1, 1.0))
    of_floats, of_pixels = both(small_conv_net(), tmp_path, 16, p)
    front = load_front(of_pixels)
    assert isinstance(front, Folded) and (front.mask is not None) == mask
    shown = pictures(16)
    expected = logits(of_floats, runtime.normalize(shown, p))
    np.testing.assert_allclose(logits(of_pixels, shown), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [mirrored, space_to_depth])
def test_computed_normalization_precedes_other_first_layers(make: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    of_floats, of_pixels = both(make().eval(), tmp_path, 32)
    shown = pictures(32)
    assert isinstance(load_front(of_pixels), Outside)
    expected = logits(of_floats, runtime.normalize(shown, IMAGENET))
    np.testing.assert_allclose(logits(of_pixels, shown), expected, atol=1e-4, rtol=0)
    int8 = quantize_int8(of_pixels, tmp_path / "int8.onnx", [shown])
    assert int8.recipe["input"] == "uint8; normalization in float, before the network"
    assert signal_to_noise(expected, logits(int8.path, shown)) > 20


def test_parity_is_shown_on_the_pixels_themselves(tmp_path: Path) -> None:
    network = small_conv_net()
    _, of_pixels = both(network, tmp_path, 16)
    shown = pictures(16)
    images = torch.from_numpy(runtime.normalize(shown, IMAGENET))
    assert check_parity(network, of_pixels, images, pixels=shown).max_abs <= 1e-4
    with pytest.raises(ExportError, match="differ"):
        check_parity(network, of_pixels, images, pixels=shown[::-1].copy())
    with pytest.raises(ExportError, match="required for a uint8 input"):
        check_parity(network, of_pixels, images)


def optimize(path: Path, to: Path) -> onnx.GraphProto:
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(to), 3
    ort.InferenceSession(str(path), options, disabled_optimizers=["Pad_Fusion"])
    return onnx.load(str(to)).graph


def test_int8_takes_the_pixels_without_a_step_in_float(tmp_path: Path) -> None:
    of_floats, of_pixels = both(small_conv_net(), tmp_path, 32)
    shown, fresh = pictures(32), pictures(32)[::-1, ::-1].copy()
    normalized = runtime.normalize(fresh, IMAGENET)
    a = quantize_int8(of_floats, tmp_path / "a.onnx", [runtime.normalize(shown, IMAGENET)])
    b = quantize_int8(of_pixels, tmp_path / "b.onnx", [shown])
    expected = logits(of_floats, normalized)
    lost = signal_to_noise(expected, logits(a.path, normalized))
    assert signal_to_noise(expected, logits(b.path, fresh)) > min(25, lost - 3)
    assert b.recipe["input"] == "uint8; normalization folded into the first convolution"
    nodes = optimize(b.path, tmp_path / "optimized.onnx").node
    first = next(i for i, node in enumerate(nodes) if node.op_type == "QLinearConv")
    assert {node.op_type for node in nodes[:first]} == {"Reshape", "Transpose", "Pad"}
    assert not any(node.op_type == "QuantizeLinear" for node in nodes)


def test_signed_activations_take_the_same_pixels_shifted(tmp_path: Path) -> None:
    """As for arm64: the shift by 128 loses nothing."""
    _, of_pixels = both(small_conv_net(), tmp_path, 16)
    core = onnx.load(str(of_pixels))
    front = split(core)
    [override] = front.overrides(signed=True)[PIXELS]
    scale, zero_point = float(override["scale"]), int(override["zero_point"])
    fed = front.feed(pictures(16))
    signed = np.rint(fed / scale) + zero_point
    assert override["zero_point"].dtype == np.int8 and signed.min() >= -128 and signed.max() <= 127
    np.testing.assert_allclose((signed - zero_point) * scale, fed, atol=1e-6)


def test_attached_normalization_can_be_removed(tmp_path: Path) -> None:
    of_floats, of_pixels = both(small_conv_net(), tmp_path, 16)
    model, shown = onnx.load(str(of_pixels)), pictures(16)
    whole = model.SerializeToString(deterministic=True)
    front = split(model)
    core = ort.InferenceSession(model.SerializeToString())
    assert core.get_inputs()[0].shape == ["batch", 4, 16, 16]
    [output] = core.run(None, {PIXELS: front.feed(shown)})
    np.testing.assert_allclose(output, logits(of_pixels, shown), atol=1e-5)
    attach(model, front)
    assert sorted(node.name for node in model.graph.node) == sorted(
        node.name for node in onnx.load_from_string(whole).graph.node
    )
    np.testing.assert_array_equal(
        ort.InferenceSession(model.SerializeToString()).run(None, {"input": shown})[0],
        ort.InferenceSession(whole).run(None, {"input": shown})[0],
    )
    with pytest.raises(ExportError, match="not written by questpress"):
        split(onnx.load(str(of_floats)))


def test_fourth_channels_weights_do_not_coarsen_the_others(tmp_path: Path) -> None:
    """None is the largest of its output channel, and all are as large as they may be."""
    _, of_pixels = both(small_conv_net(), tmp_path, 16)
    model = onnx.load(str(of_pixels))
    front = load_front(of_pixels)
    weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if list(t.dims)[1:] == [4, 3, 3])
    largest = np.abs(weight).max((2, 3))
    assert (largest[:, 3] <= largest[:, :3].max(1) * 1.0001).all()
    assert isinstance(front, Folded) and front.mask is not None
    nearer = largest[:, 3] * (front.mask - front.zero_point) / max(1, front.mask - front.zero_point - 1)
    assert (nearer > largest[:, :3].max(1)).any()


def artifact(folder: Path, file: Path, *, takes_pixels: bool) -> Path:
    folder.mkdir()
    shipped = onnx_file(Path(shutil.copy(file, folder)))
    write_manifest(
        folder, files=[ShippedFile(shipped, "fp32")], preprocessing=IMAGENET, labels=LABELS, origin={},
        takes_pixels=takes_pixels,
    )  # fmt: skip
    return folder


def test_photo_gets_the_same_prediction_from_either_input(tmp_path: Path) -> None:
    of_floats, of_pixels = both(small_conv_net(), tmp_path, 32)
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3)).astype(np.uint8))
    coarse.resize((70, 50)).save(tmp_path / "photo.jpg")
    a = artifact(tmp_path / "floats", of_floats, takes_pixels=False)
    b = artifact(tmp_path / "taken", of_pixels, takes_pixels=True)
    predictions = []
    for classifier in (
        runtime.Classifier.load(a, precision="fp32"),
        runtime.Classifier.load(b, precision="fp32"),
        runtime.Classifier.load(of_pixels),
    ):
        [prediction] = classifier.predict([tmp_path / "photo.jpg"], top=4)
        predictions.append(prediction)
    assert predictions[0].label == predictions[1].label == predictions[2].label
    for other in predictions[1:]:
        assert [label for label, _ in other.top] == [label for label, _ in predictions[0].top]
        np.testing.assert_allclose([p for _, p in other.top], [p for _, p in predictions[0].top], atol=1e-5)
    floats, taken = (json.loads((folder / "manifest.json").read_text()) for folder in (a, b))
    assert ("input" in floats, taken["input"]) == (False, "uint8")
    shared = {"name": "input", "color": "RGB"}
    shapes = (["batch", 3, 32, 32], ["batch", 32, 32, 3])
    assert floats["inputs"] == [{**shared, "dtype": "float32", "shape": shapes[0], "layout": "NCHW"}]
    assert taken["inputs"] == [{**shared, "dtype": "uint8", "shape": shapes[1], "layout": "NHWC"}]
    assert [step["step"] for step in taken["steps"]] == ["decode", "resize", "crop"]


def test_classifier_of_pixels_refuses_floats(tmp_path: Path) -> None:
    _, of_pixels = both(small_conv_net(), tmp_path, 32)
    classifier = runtime.Classifier.load(of_pixels)
    with pytest.raises(ValueError, match="uint8"):
        classifier.logits(np.zeros((1, 3, 32, 32), np.float32))
    assert classifier.logits(classifier.to_input(np.zeros((0, 32, 32, 3), np.uint8))).shape == (0, 4)


def test_float_calibration_images_are_refused(tmp_path: Path) -> None:
    _, of_pixels = both(small_conv_net(), tmp_path, 16)
    with pytest.raises(ExportError, match="must be uint8 for this model, got float32"):
        quantize_int8(of_pixels, tmp_path / "a.onnx", [np.zeros((2, 3, 16, 16), np.float32)])
