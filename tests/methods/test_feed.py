"""FEED against its formula, written out in numpy, and in a run with teachers of different networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questpress.models.build import build as network
from questpress.pipeline import methods
from questpress.pipeline.methods.base import Batch, Setup, Shapes
from questpress.pipeline.methods.feed import Feed, direction_error
from safetensors.torch import load_file

from tests.support import little
from tests.support.toys import check_gradients

B, C_S = 3, 4
STUDENT, FINER, COARSER = (C_S, 4, 6), (5, 8, 6), (2, 2, 3)
"""The student's map, and one of a teacher whose grid is finer, and one whose is coarser."""
RNG = np.random.default_rng(0)
X_S, X_T, X_U = (RNG.standard_normal((B, *size)) for size in (STUDENT, FINER, COARSER))
LABELS = torch.zeros(B, dtype=torch.long)


def shapes(size: tuple[int, int, int]) -> Shapes:
    return Shapes({"map": size}, vector=None, logits=2)


def feed(*teachers: tuple[int, int, int], **settings: Any) -> Feed:
    torch.manual_seed(1)
    parameters = methods.parse_parameters(["feed"], {f"feed.{key}": value for key, value in settings.items()})
    method = methods.load("feed")(
        parameters["feed"], Setup(shapes(STUDENT), [shapes(t) for t in teachers], {})
    )
    assert isinstance(method, Feed)
    return method.double()


def readout(x: np.ndarray) -> dict[str, torch.Tensor]:
    return {"map": torch.tensor(x)}


def loss(method: Feed, *teachers: np.ndarray, student: np.ndarray = X_S) -> float:
    given = [readout(x) for x in teachers]
    return method(Batch(readout(student), given, LABELS, 0))["feed"].item()


def pooled(x: np.ndarray, h: int, w: int) -> np.ndarray:
    n, c = x.shape[:2]
    return x.reshape(n, c, h, x.shape[2] // h, w, x.shape[3] // w).mean((3, 5))


def translated(x: np.ndarray, transform: torch.nn.Module) -> np.ndarray:
    result: np.ndarray = transform(torch.tensor(x)).detach().numpy()
    return result


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The L1 between maps of length 1, over √n, the mean over the batch."""
    n = a[0].size
    rows = [x / np.linalg.norm(x.ravel()) - y / np.linalg.norm(y.ravel()) for x, y in zip(a, b, strict=True)]
    return float(np.mean([np.abs(row).sum() / n**0.5 for row in rows]))


def by_hand(method: Feed) -> list[float]:
    """Each teacher's error: the teacher's map is pooled if it is finer, otherwise the student's is."""
    return [
        relative(pooled(X_T, 4, 6), translated(X_S, method.transforms[0])),
        relative(X_U, translated(pooled(X_S, 2, 3), method.transforms[1])),
    ]


def with_biases(method: Feed) -> Feed:
    for name, parameter in method.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return method


def test_loss_is_the_sum_of_normalized_l1_over_teachers_of_other_grids_and_widths() -> None:
    method = with_biases(feed(FINER, COARSER, beta=3))
    assert loss(method, X_T, X_U) == pytest.approx(3 * sum(by_hand(method)), rel=1e-9)


def test_linear_transform_is_one_convolution_of_single_positions() -> None:
    method = with_biases(feed(FINER, COARSER, transform="linear"))
    assert [type(layer) for layer in method.transforms[0].children()] == [torch.nn.Conv2d]
    assert [p.shape for p in method.transforms[0].parameters()] == [(5, C_S, 1, 1), (5,)]
    assert loss(method, X_T, X_U) == pytest.approx(8.4 * sum(by_hand(method)), rel=1e-9)


def test_nonlinear_transform_goes_through_the_students_and_the_teachers_width() -> None:
    [transform] = feed(FINER, norm="true").transforms
    layers = list(transform.children())
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3
    assert {layer.negative_slope for layer in layers[2::3]} == {0.1}
    weights = [p.shape for p in transform.parameters() if p.ndim == 4]
    assert weights == [(C_S, C_S, 3, 3), (5, C_S, 3, 3), (5, 5, 3, 3)]


def test_error_of_each_teacher_is_a_metric() -> None:
    method = feed(FINER, COARSER)
    for _ in range(2):
        loss(method, X_T, X_U)
    metrics = method.metrics()
    assert list(metrics) == ["reconstruction_error (0)", "reconstruction_error (1)"]
    assert [float(error) for error in metrics.values()] == pytest.approx(by_hand(method), rel=1e-6)
    assert method.metrics() == {}
    single = feed(FINER)
    loss(single, X_T)
    assert list(single.metrics()) == ["reconstruction_error"]


@pytest.mark.parametrize("settings", [{}, {"transform": "linear"}])
def test_gradients_equal_finite_differences(settings: dict[str, Any]) -> None:
    method = feed(FINER, COARSER, **settings)
    check_gradients(method, "map", X_S, [readout(X_T), readout(X_U)], LABELS)


@pytest.mark.parametrize("size", [(16, 4, 4), (64, 8, 8), (512, 7, 7)])
def test_between_random_directions_the_error_is_the_same_for_every_size_of_map(
    size: tuple[int, int, int],
) -> None:
    x, y = torch.tensor(RNG.standard_normal((2, 8, *size)))
    # The mean of |a − b| for two standard normal numbers is 2/√π.
    assert direction_error(x, y).mean().item() == pytest.approx(2 / np.pi**0.5, rel=0.02)


def test_loss_ignores_the_length_of_a_map() -> None:
    x = torch.tensor(X_T)
    assert direction_error(x, 7 * x).tolist() == pytest.approx([0] * B, abs=1e-12)


def test_zero_maps_give_finite_gradients() -> None:
    student = torch.zeros(B, *STUDENT, dtype=torch.float64, requires_grad=True)
    teacher = X_T.copy()
    teacher[1:] = 0
    method = feed(FINER)
    result = method(Batch({"map": student}, [readout(teacher)], LABELS, 0))["feed"]
    result.backward()
    assert result.item() > 0
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert student.grad[0].abs().sum() > 0 and not student.grad[1:].any()
    assert loss(method, np.zeros_like(X_T)) == 0


def test_half_precision_maps_are_compared_in_single_precision() -> None:
    large = torch.full((1, 2048, 7, 7), 100.0, dtype=torch.float16)  # whose length is beyond half precision
    error = direction_error(large, large.roll(1, 1))
    assert error.dtype == torch.float32 and error.item() == pytest.approx(0, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert direction_error(large.bfloat16(), -large.bfloat16()).item() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_cached_outputs_give_the_same_loss(scale: float) -> None:
    method = feed(FINER, COARSER)
    cached = []
    for t, x in enumerate((X_T, X_U)):
        [output] = method.cached_outputs(t)
        parts = output.compact(readout(scale * x))
        assert {name: (part.shape[1:], part.dtype) for name, part in parts.items()} == {
            name: (shape, torch.float16) for name, (shape, _) in output.arrays.items()
        }
        assert output.bytes_per_image == Feed.cached_bytes(None, shapes(STUDENT), shapes((FINER, COARSER)[t]))
        cached.append(parts)
    assert cached[0]["map.unit"].shape == (B, 5, 4, 6)
    from_cache = method(Batch(readout(X_S), cached, LABELS, 0))["feed"].item()
    assert from_cache == pytest.approx(loss(method, X_T, X_U), rel=1e-3)


TEACHERS = (
    "--teacher", "cifar_resnet14", "--teacher", "cifar_vgg8", "--teacher-weights", "none",
    "--teacher-weights", "none", "--student", little.STUDENT,
)  # fmt: skip


def test_run_reports_each_teachers_error_and_ships_no_transform(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "feed"
    little.check_success(little.compress(
        *TEACHERS, *little.SMALL, *little.SHORT, "--method", "feed", "--data", data, "--out", run,
        "--cache", cache, "--until", "student",
    ))  # fmt: skip
    plain = network(little.STUDENT, num_classes=3, image_size=16, seed=0)
    assert load_file(run / "student.safetensors").keys() == plain.state_dict().keys()
    report = little.report(run)
    last = [epoch for epoch in report["epochs"] if epoch["stage"] == "student"][-1]
    errors = [last["metrics"][f"reconstruction_error ({t})"] for t in (0, 1)]
    assert all(0 < error < 1.5 for error in errors)
    factor = next(entry["factor"] for entry in report["balance"])
    assert 8.4 * sum(errors) == pytest.approx(last["losses"]["feed"] / factor, rel=1e-3)
    assert [(entry["teacher"], entry["error"]) for entry in report["reconstruction"]] == [
        ("cifar_resnet14", pytest.approx(errors[0])),
        ("cifar_vgg8", pytest.approx(errors[1])),
    ]
    for page in ("report.html", "report.md"):
        assert "Reconstruction" in (run / page).read_text()
