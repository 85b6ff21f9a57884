"""Runs with a sum of methods."""

from pathlib import Path

import onnx
import pytest
from questpress.models.build import build
from questpress.pipeline import methods
from questpress.pipeline.training.student import loss_weights
from safetensors.torch import load_file

from tests.support import little
from tests.support.operations import Operations

NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "upsample_bicubic2d_backward",
    "grid_sampler_2d_backward", "reflection_pad2d_backward", "nll_loss2d_forward", "histc", "bincount",
    "median", "kthvalue", "put_",
}  # fmt: skip
"""Operations without a deterministic form on CUDA (see torch.use_deterministic_algorithms)."""


OPERATIONS = Operations()


@pytest.fixture(scope="module")
def of_all(data: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A deterministic run with all methods, which learn from images without labels as well."""
    out = tmp_path_factory.mktemp("runs") / "all"
    photos = little.photos(out.parent / "photos", {".": 7, "deep/er": 10}, first=5000)
    (photos / "copy.png").write_bytes(next(data.rglob("*.png")).read_bytes())
    unlabeled = ("--unlabeled", "~/photos", "--unlabeled-ratio", "0.5")
    weights = ("--weight", "kd=0.25", "--weight", "ce=2")
    every = ("--method", "+".join(methods.METHODS))
    more = (*every, *weights, *unlabeled, "--balance", "off", "--deterministic", "--until", "export")
    with OPERATIONS, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(out.parent))
        result = little.job(data, out, cache, *more)
    assert result.exit_code == 0, (result.output, result.exception)
    return out


@pytest.mark.parametrize("run", ["finished", "of_all"])
def test_student_that_ships_is_timms_plain_network_without_heads(
    run: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(run)
    plain = build(little.STUDENT, num_classes=3, image_size=16, seed=0)
    shipped = load_file(folder / "student.safetensors")
    assert {name: tensor.shape for name, tensor in shipped.items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    plain.load_state_dict(shipped, strict=True)
    weights = onnx.load(folder / "artifact" / "student.onnx").graph.initializer
    # BatchNorm is folded into the convolutions: weights and biases are left, and no head's matrix among them.
    numbers = sum(len(onnx.numpy_helper.to_array(tensor).ravel()) for tensor in weights)
    assert numbers <= sum(parameter.numel() for parameter in plain.parameters())


def test_every_method_of_a_sum_gives_its_weighted_loss(of_all: Path) -> None:
    for epoch in little.report(of_all)["epochs"]:
        if epoch["stage"] == "student":
            losses = epoch["losses"]
            assert set(losses) == {"loss", "ce", *methods.METHODS}
            assert sum(losses[name] for name in ("ce", *methods.METHODS)) == pytest.approx(
                losses["loss"], rel=1e-5
            )


def test_every_method_has_a_deterministic_form_on_a_gpu(of_all: Path) -> None:
    assert {"avg_pool2d_backward", "convolution_backward"} <= OPERATIONS.counts.keys()
    assert NOT_DETERMINISTIC.isdisjoint(OPERATIONS.counts)
    assert little.report(of_all)["config"]["deterministic"] is True


def test_report_counts_images_without_labels_and_names_the_papers(of_all: Path) -> None:
    content = little.report(of_all)
    assert content["data"]["unlabeled"] == 17 and sum(content["data"]["left_out"].values()) == 1
    assert "| without labels | 17 |" in (of_all / "report.md").read_text()
    assert all(methods.load(name).paper in content["method_source"] for name in methods.METHODS)


def test_vocabulary_and_biases_are_not_those_of_other_images_without_labels(
    of_all: Path, data: Path, tmp_path: Path, cache: Path
) -> None:
    photos = little.photos(tmp_path / "photos", {".": 17}, first=7000)
    more = ("--method", "quest+mimic", "--unlabeled", photos, "--until", "prepare")
    little.check_success(little.job(data, tmp_path / "run", cache, *more))
    ours, theirs = (load_file(run / "prepared.safetensors") for run in (tmp_path / "run", of_all))
    assert not any(ours[name].equal(theirs[name]) for name in ("quest.0.map.words", "mimic.0.bias"))


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("none", {}, {"ce": 1.0}),
        ("kd", {}, {"ce": 0.1}),
        ("quest", {}, {"ce": 1.0}),
        ("quest+kd", {}, {"ce": 1.0}),
        ("kd", {"ce": 0.7}, {"ce": 0.7}),
        ("quest+dkd", {"dkd": 0.5, "ce": 2}, {"dkd": 0.5, "ce": 2}),
    ],
)
def test_cross_entropy_has_the_papers_weight_alone_and_one_in_a_sum(
    method: str, given: dict[str, float], expected: dict[str, float]
) -> None:
    classes = {name: methods.load(name) for name in methods.parse_methods(method)}
    assert loss_weights(given, classes) == expected
