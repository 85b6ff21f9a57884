"""Teachers without a head, from self-supervised weights."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from questpress.models.build import build
from safetensors.torch import load_file
from torch import nn

from tests.support import little

NAME = "cifar_wrn_16_1"
OPTIONS = (
    "--teacher", NAME, "--student", little.STUDENT, *little.SMALL, "--epochs", "2", "--teacher-head", "none",
)  # fmt: skip


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like MoCo's: two encoders with projectors, a queue and an optimizer."""
    network = build(NAME, num_classes=0, image_size=32, seed=7)
    state: dict[str, torch.Tensor] = {}
    for encoder, factor in (("encoder_q", 1.0), ("encoder_k", 0.5)):
        for key, value in network.state_dict().items():
            state[f"module.{encoder}.{key}"] = factor * value if value.is_floating_point() else value
        for layer, size in (("0", (64, 64)), ("2", (128, 64))):
            state[f"module.{encoder}.fc.{layer}.weight"] = torch.randn(size)
    state["module.queue"] = torch.randn(128, 256)
    file = tmp_path_factory.mktemp("weights") / "contrastive.pth"
    torch.save({"epoch": 200, "state_dict": state, "optimizer": {"state": {}}}, file)
    return file


@pytest.fixture(scope="module")
def headless(contrastive: Path, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "headless"
    result = little.check_success(little.compress(
        *OPTIONS, "--teacher-weights", contrastive, "--method", "mimic", "--set", "mimic.hashes=32",
        "--data", data, "--out", out, "--cache", cache,
    ))  # fmt: skip
    (out.parent / "stderr.txt").write_text(result.stderr)
    (out.parent / "stdout.txt").write_text(result.stdout)
    return out


def test_headless_backbone_is_loaded_and_not_tuned(headless: Path) -> None:
    plain: nn.Module = build(NAME, num_classes=0, image_size=32, seed=7)
    kept = load_file(headless / "teacher.safetensors")
    assert kept.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, kept[key]) for key, value in plain.state_dict().items())
    assert not any(epoch["stage"] == "teacher" for epoch in little.report(headless)["epochs"])


def test_headless_teacher_has_no_accuracy(headless: Path) -> None:
    report = little.report(headless)
    assert report["teacher"]["head"] == "none" and report["teacher"]["score"] is None
    assert report["student_int8"]["score"]["n"] > 0 and report["student_int8"]["agreement"] is None
    assert report["examples"] and all(example["teacher"] is None for example in report["examples"])
    note = f"{NAME} has no classifier head"
    for text in (
        (headless / "report.html").read_text(),
        (headless / "report.md").read_text().replace("\\", ""),
        " ".join((headless.parent / "stdout.txt").read_text().split()),
    ):
        assert note in text
        assert "None" not in text
    assert "features only, no accuracy" in (headless.parent / "stderr.txt").read_text()


def test_headless_teacher_is_timed_as_onnx(headless: Path) -> None:
    graph = onnx.load(headless / "bench" / "teacher.onnx").graph
    assert [output.name for output in graph.output] == ["features"]
    assert little.report(headless)["teacher"]["latency_ms"]["1"]["n"] > 0
    manifest = json.loads((headless / "artifact" / "manifest.json").read_text())
    assert manifest["origin"]["teachers"][0]["name"] == NAME


def test_hash_std_follows_from_the_width_and_the_loss_uses_all_samples(headless: Path) -> None:
    report = little.report(headless)
    assert report["hashes"][0]["std"] == pytest.approx(64**-0.5)
    assert "teacher_right" not in report["epochs"][-1]["metrics"]


@pytest.mark.parametrize(
    ("method", "more"), [("kd", ()), ("dkd", ()), ("dist", ()), ("mimic", ("--set", "mimic.variant=lshl2_s"))]
)
def test_methods_that_read_logits_are_refused(
    method: str, more: tuple[str, ...], contrastive: Path, data: Path, tmp_path: Path
) -> None:
    result = little.compress(
        *OPTIONS, "--teacher-weights", contrastive, "--method", method, *more, "--data", data, "--out",
        tmp_path,
    )  # fmt: skip
    message = little.refused(
        result, 2, f"--method {method}", f"reads the logits of {NAME}", "--teacher-head none"
    )
    assert "Use a feature method" in message


@pytest.mark.parametrize("more", [("--teacher-weights", "none"), ("--data", "digits")])
def test_headless_teacher_needs_weights(more: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    result = little.compress(*OPTIONS, "--method", "mimic", "--data", data, "--out", tmp_path, *more)
    little.refused(result, 2, "--teacher-head none requires a trained teacher", "--teacher-weights")


def test_deeper_network_is_not_taken_for_one_with_a_projector(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "deeper.pth"
    torch.save(build("cifar_wrn_40_1", num_classes=0, image_size=32, seed=0).state_dict(), file)
    result = little.compress(
        *OPTIONS, "--teacher-weights", file, "--method", "mimic", "--data", data, "--out", tmp_path / "run"
    )
    little.refused(result, 1, "do not fit cifar_wrn_16_1", "unexpected")


def test_ensemble_skips_headless_teachers(contrastive: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    little.check_success(little.compress(
        *OPTIONS, "--teacher", little.TEACHER, "--teacher-head", "auto", "--teacher-weights", contrastive,
        "--teacher-weights", "none", "--teacher-epochs", "2", "--method", "quest+mimic",
        "--set", "quest.words=8", "--set", "mimic.hashes=32", "--data", data, "--out", tmp_path / "run",
        "--cache", cache, "--until", "validate",
    ))  # fmt: skip
    report = little.report(tmp_path / "run")
    first, second = report["teachers"]
    assert first["score"] is None and second["score"] is not None
    assert report["teacher"]["score"]["correct"] == second["score"]["correct"]
    assert report["student_int8"]["agreement"] is not None
    shipped = load_file(tmp_path / "run" / "student.safetensors")
    assert shipped["fc.weight"].shape == (3, 64)  # learned as 128 numbers, 64 for each teacher
