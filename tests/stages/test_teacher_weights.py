"""Sources of a teacher's weights, kept and replaced heads, and errors."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from questpress.export.runtime import Preprocessing, decode_image, render
from questpress.models.build import build, geometry
from questpress.models.checkpoint import save_weights
from questpress.models.initialize import initialize
from questpress.models.weights import permute_head
from questpress.pipeline.runs.results import Epoch
from questpress.pipeline.stages import teacher as stages_teacher
from questpress.pipeline.tasks import load_task
from questpress.pipeline.training.trainer import _check_loss
from torch import nn

from tests.support import little, several
from tests.support.little import CLASSES, SMALL, STUDENT, Calls, compress, refused, report, weights
from tests.support.pictures import open_folder

NAME = "cifar_resnet8"


def load_split(data: Path, role: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's images [N,3,16,16] and labels without our reader."""
    g = geometry(NAME, 16)
    p = Preprocessing.create(16, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std)
    images = open_folder(data).split(role)  # type: ignore[arg-type]
    pixels = np.stack([render(decode_image(image.read()), p) for image in images])  # type: ignore[arg-type]
    x = torch.from_numpy((pixels / 255 - np.array(g.mean)) / np.array(g.std)).permute(0, 3, 1, 2).float()
    return x, torch.tensor([image.label for image in images])


@pytest.fixture(scope="module")
def trained(data: Path) -> nn.Module:
    """Train a network on the colors in a plain loop of torch."""
    network: nn.Module = build(NAME, num_classes=3, image_size=16, seed=3)
    images, labels = load_split(data, "train")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def named(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save its weights with the names of its classes."""
    file = tmp_path_factory.mktemp("weights") / "colors.safetensors"
    save_weights(trained, file, {"labels": json.dumps(CLASSES)})
    return file


def teach(data: Path, tmp_path: Path, cache: Path, weights: Path | str, *more: str):
    return compress(
        "--teacher", NAME, "--student", STUDENT, *SMALL, "--teacher-epochs", "1", "--data", data,
        "--out", tmp_path / "run", "--cache", cache, "--until", "teacher", "--teacher-weights", weights,
        *more,
    )  # fmt: skip


def teacher(tmp_path: Path) -> dict:
    return report(tmp_path / "run")["teacher"]


def test_weights_that_fit_are_used_as_they_are_and_measured_as_torch_measures_them(
    trained, named, data, cache, tmp_path
):
    little.check_success(teach(data, tmp_path, cache, named))
    for role, key in (("test", "score"), ("val", "val_score")):
        images, labels = load_split(data, role)
        with torch.no_grad():
            right = int((trained(images).argmax(1) == labels).sum())
        assert teacher(tmp_path)[key]["correct"] == right and teacher(tmp_path)[key]["n"] == len(labels)
    assert (
        teacher(tmp_path)["head"] == "kept" and "colors.safetensors (sha256" in teacher(tmp_path)["weights"]
    )
    assert report(tmp_path / "run")["epochs"] == []
    before = trained.state_dict()
    after = little.load_file(tmp_path / "run/teacher.safetensors")
    assert all(np.array_equal(after[key], before[key].numpy()) for key in before)


def test_head_for_other_classes_of_the_same_number_is_replaced_and_tuned(trained, data, cache, tmp_path):
    save_weights(trained, tmp_path / "w.safetensors", {"labels": json.dumps(["cat", "dog", "horse"])})
    result = little.check_success(teach(data, tmp_path, cache, tmp_path / "w.safetensors"))
    assert "the same number of classes, but other ones" in result.stderr
    assert teacher(tmp_path)["head"] == "replaced"
    assert [e["stage"] for e in report(tmp_path / "run")["epochs"]] == ["teacher"]


def test_class_names_are_compared_without_case_and_underscores(trained, data, cache, tmp_path):
    save_weights(trained, tmp_path / "w.safetensors", {"labels": json.dumps(["Blue", "GREEN", "red "])})
    assert teach(data, tmp_path, cache, tmp_path / "w.safetensors").exit_code == 0
    assert teacher(tmp_path)["head"] == "kept"


def test_head_of_another_size_is_replaced_and_tuned(data, cache, tmp_path):
    save_weights(build(NAME, num_classes=7, image_size=16, seed=1), tmp_path / "w.safetensors", {})
    little.check_success(teach(data, tmp_path, cache, tmp_path / "w.safetensors"))
    assert teacher(tmp_path)["head"] == "replaced"


def test_keep_with_another_number_of_classes_is_refused(data, cache, tmp_path):
    save_weights(build(NAME, num_classes=7, image_size=16, seed=1), tmp_path / "w.safetensors", {})
    result = teach(data, tmp_path, cache, tmp_path / "w.safetensors", "--teacher-head", "keep")
    refused(result, 1, "7 classes", "3", "--teacher-head replace")


def test_keep_without_weights_is_refused(data, cache, tmp_path):
    refused(teach(data, tmp_path, cache, "none", "--teacher-head", "keep"), 2, "keep", "none")


def test_head_near_chance_stops_the_job(trained, data, cache, tmp_path):
    lost = build(NAME, num_classes=3, image_size=16, seed=3)
    lost.load_state_dict(trained.state_dict())
    with torch.no_grad():  # the same classes in another order: right on none of the images
        lost.fc.weight.copy_(lost.fc.weight.roll(1, 0).clone())
        lost.fc.bias.copy_(lost.fc.bias.roll(1, 0).clone())
    save_weights(lost, tmp_path / "w.safetensors", {})
    result = teach(data, tmp_path, cache, tmp_path / "w.safetensors")
    refused(result, 1, "chance", "33.3 %", "--teacher-head replace")
    assert not (tmp_path / "run/teacher.safetensors").exists()


def test_weak_head_with_matching_names_is_reported(data, cache, tmp_path):
    weak = build(NAME, num_classes=3, image_size=16, seed=5)
    save_weights(weak, tmp_path / "w.safetensors", {"labels": json.dumps(CLASSES)})
    result = little.check_success(teach(data, tmp_path, cache, tmp_path / "w.safetensors"))
    assert "near chance" in result.stderr and "It may be too weak to teach" in result.stderr


def test_same_weights_in_another_place_are_the_same_and_others_in_the_same_place_are_not(
    trained, named, data, cache, tmp_path
):
    assert teach(data, tmp_path, cache, named).exit_code == 0
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(named.read_bytes())
    again = teach(data, tmp_path, cache, moved)
    assert again.exit_code == 0 and "(kept)" in again.stderr, again.output
    save_weights(trained, moved, {"labels": json.dumps(CLASSES), "another": "file"})
    refused(teach(data, tmp_path, cache, moved), 2, "teacher-weights was", "--fresh")


def test_weights_file_that_is_not_there_is_refused_before_anything_starts(data, cache, tmp_path):
    refused(teach(data, tmp_path, cache, tmp_path / "none.pth"), 2, "none.pth")
    assert not (tmp_path / "run").exists()


def test_runs_teacher_that_was_exchanged_for_a_pickle_is_not_opened(
    named, data, cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert teach(data, tmp_path, cache, named).exit_code == 0
    call = Calls(Path.touch, Path("made_by_a_pickle"))
    torch.save({"state_dict": {}, "extra": call}, tmp_path / "run" / "teacher.safetensors")
    refused(teach(data, tmp_path / "other", cache, tmp_path / "run" / "teacher.safetensors"), 1, "damaged")
    assert teach(data, tmp_path, cache, named).exit_code == 0  # written again, since its checksum differs
    assert not (tmp_path / "made_by_a_pickle").exists()


def test_weights_that_are_not_finite_are_not_taught_from(trained, data, cache, tmp_path):
    broken = build(NAME, num_classes=3, image_size=16)
    broken.load_state_dict(trained.state_dict())
    with torch.no_grad():
        broken.conv1.weight[0, 0, 0, 0] = float("nan")
    save_weights(broken, tmp_path / "w.safetensors", {})
    line = refused(teach(data, tmp_path, cache, tmp_path / "w.safetensors"), 1, "conv1.weight", "not finite")
    assert "w.safetensors" in line and not (tmp_path / "run/teacher.safetensors").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_missing_student_weights_are_reported_before_training(data, cache, tmp_path, monkeypatch, dry):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = (
        "--student", "mobilenetv3_small_050", *SMALL, "--data", data, "--image-size", "32",
        "--out", tmp_path / "run", "--cache", cache, *(["--dry-run"] if dry else []),
    )  # fmt: skip
    alone = compress("--teacher", little.TEACHER, "--teacher-weights", "none", *options)
    line = refused(alone, 1, "--student-weights FILE", "--student-weights none", "mobilenetv3_small_050")
    assert "--teacher-weights" not in line
    both = compress("--teacher", "resnet18", *options)
    refused(both, 1, "--teacher-weights none --student-weights none", "resnet18", "mobilenetv3_small_050")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("dry", [True, False])
def test_unfitting_student_weights_are_reported_before_training(data, cache, tmp_path, dry):
    save_weights(build("cifar_wrn_16_1", num_classes=3, image_size=16), tmp_path / "w.safetensors", {})
    (tmp_path / "w.txt").write_text("no weights at all")
    for name, word in (("w.safetensors", "conv1.weight"), ("w.txt", "w.txt")):
        given = ("--student-weights", tmp_path / name, *(["--dry-run"] if dry else []))
        line = refused(little.job(data, tmp_path / "run", cache, *given), 1, name, word)
        assert "teacher" not in line
    assert not list((tmp_path / "run").glob("*.safetensors")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_resumed_run_needs_no_weights(a_run, data, cache, monkeypatch):
    checked: list[list[str]] = []
    monkeypatch.setattr(
        "questpress.pipeline.api.run.check_weights",
        lambda _options, _data, stages, **_: checked.append(stages),
    )
    little.check_success(little.job(data, a_run, cache, "--dry-run"))
    assert checked == [[]]


def test_student_without_published_weights_starts_from_scratch_with_a_note(finished):
    stderr = (finished.parent / "stderr.txt").read_text()
    assert f"timm has no pretrained weights for {STUDENT}: the student starts from scratch" in stderr
    assert report(finished)["student"]["weights"] == "scratch"


def test_student_starts_from_its_weights_file(named, data, cache, tmp_path):
    little.check_success(compress(
        "--teacher", NAME, "--teacher-weights", named, "--student", NAME, "--student-weights", named, *SMALL,
        "--epochs", "1", "--lr", "1e-9", "--data", data, "--cache", cache, "--out", tmp_path / "run",
        "--set", "quest.words=8", "--until", "student",
    ))  # fmt: skip
    started, student = little.load_file(named), little.load_file(tmp_path / "run/student.safetensors")
    assert np.allclose(student["conv1.weight"], started["conv1.weight"], atol=1e-6)


def test_head_that_names_more_classes_keeps_the_rows_of_the_data(trained, data, cache, tmp_path):
    wide = build(NAME, num_classes=5, image_size=16, seed=1)
    names = ["Red", "other", "blue", "teal", "GREEN"]
    rows = [names.index(name) for name in ("blue", "GREEN", "Red")]
    state = {**trained.state_dict()}
    for key in ("fc.weight", "fc.bias"):
        own = wide.state_dict()[key]
        own[rows] = state[key]
        state[key] = own
    wide.load_state_dict(state)
    save_weights(wide, tmp_path / "w.safetensors", {"labels": json.dumps(names)})
    teach_wide = partial(teach, data, tmp_path, cache, tmp_path / "w.safetensors")
    result = little.check_success(teach_wide("--teacher-head", "keep"))
    assert "names the data's 3 classes: their rows are kept" in result.stderr
    after = little.load_file(tmp_path / "run/teacher.safetensors")
    assert all(np.array_equal(after[key], value.numpy()) for key, value in trained.state_dict().items())
    # The images have 16 px, the network is for 32.
    tuned = little.check_success(teach_wide("--fresh", "--teacher-lr", "1e-6"))
    assert "is tuned from these rows" in tuned.stderr and teacher(tmp_path)["head"] == "tuned"
    moved = little.load_file(tmp_path / "run/teacher.safetensors")["fc.weight"] - after["fc.weight"]
    assert 0 < np.abs(moved).max() < 1e-3


def test_new_head_of_pretrained_weights_is_small(tmp_path):
    save_weights(build("mobilenetv2_035", num_classes=7, image_size=32, seed=1), tmp_path / "w.pt", {})
    network = initialize(
        "mobilenetv2_035", str(tmp_path / "w.pt"), "auto", CLASSES, 32, 0, lambda _: None
    ).network
    weight, bias = network.classifier.weight.detach(), network.classifier.bias
    assert float(weight.std()) == pytest.approx(0.01, rel=0.1) and not bias.any()


def test_head_in_the_order_of_timm_is_reordered(trained, data, cache, tmp_path):
    renamed = {"blue": "Blue", "green": "apple", "red": "x"}  # sorted here; timm: apple, Blue, x
    for folder, name in renamed.items():
        shutil.copytree(data / folder, tmp_path / "photos" / name)
    timms = build(NAME, num_classes=3, image_size=16, seed=3)
    timms.load_state_dict(trained.state_dict())
    permute_head(timms, [1, 0, 2])
    save_weights(timms, tmp_path / "w.safetensors", {})
    result = little.check_success(teach(tmp_path / "photos", tmp_path, cache, tmp_path / "w.safetensors"))
    assert "numbers the classes in timm's order" in result.stderr
    assert "classes reordered from timm's order" in teacher(tmp_path)["weights"]
    after = little.load_file(tmp_path / "run/teacher.safetensors")
    assert all(np.array_equal(after[key], value.numpy()) for key, value in trained.state_dict().items())


def test_head_in_an_unknown_order_is_described(trained, data, cache, tmp_path):
    lost = build(NAME, num_classes=3, image_size=16, seed=3)
    lost.load_state_dict(trained.state_dict())
    permute_head(lost, [1, 2, 0])
    save_weights(lost, tmp_path / "w.safetensors", {})
    result = teach(data, tmp_path, cache, tmp_path / "w.safetensors", "--val-fraction", "0")
    refused(result, 1, "With its classes in another order it would have", "--teacher-head replace")


FROM_SEEDS = ("--teachers-from-seeds", "2")


@pytest.mark.parametrize(
    ("both", "second", "cached"),
    [
        pytest.param((), ("--student", "mobilenetv2_035"), 1, id="another student"),
        pytest.param((), ("--fresh",), 1, id="fresh"),
        pytest.param((), ("--threads", "2"), 1, id="other threads"),
        pytest.param((), ("--precision", "bf16"), 0, id="another precision"),
        pytest.param((), ("--seed", "1"), 0, id="another seed"),
        pytest.param(FROM_SEEDS, ("--epochs", "3"), 2, id="several teachers"),
        pytest.param(("several labels",), ("--method", "kd"), 1, id="several labels"),
        pytest.param((*FROM_SEEDS, "two processes"), (), 2, id="two processes"),
    ],
)
def test_trained_teacher_is_taken_from_the_cache(
    named: Path, data: Path, tmp_path: Path, both: tuple[str, ...], second: tuple[str, ...], cached: int
):
    rows = [f"{file.relative_to(data)},{file.parent.name};{file.name[2]}" for file in data.rglob("*.png")]
    (tmp_path / "labels.csv").write_text("\n".join(["file,labels", *rows]))

    def run(out: Path, *more: str) -> tuple[str, dict[str, Any], list[dict[str, bytes]]]:
        labels = ("--data-dir", data, "--data", tmp_path / "labels.csv")
        arguments = (
            "--teacher", NAME, "--teacher-weights", named, "--teacher-head", "replace", "--student", STUDENT,
            *SMALL, "--pad", "2", "--teacher-epochs", "2", "--data", data, "--out", out, "--until", "teacher",
            "--cache", tmp_path / "cache", *(labels if "several labels" in more else ()),
            *(word for word in more if " " not in word),
        )  # fmt: skip
        if "two processes" in more:
            started = several.start(tmp_path / f"{out.name} output", several.command, *arguments)
            assert started.codes() == [0, 0] and not started.output(1), started.output(0)
            stderr = started.output(0)
        else:
            stderr = little.check_success(compress(*arguments)).stderr
        results = {name: report(out)[name] for name in ("epochs", "teachers")}
        return stderr, results, [weights(file) for file in sorted(out.glob("teache*[0-9r].safetensors"))]

    before = run(tmp_path / "first", *both)
    assert all(file.stat().st_nlink == 2 for file in (tmp_path / "first").glob("teache*[0-9r].safetensors"))
    after = run(tmp_path / ("first" if "--fresh" in second else "second"), *both, *second)
    assert before[0].count("taken from the cache") == 0 and len(before[2]) == max(cached, 1)
    assert len(before[1]["epochs"]) == 2 * len(before[2]) and before[1]["teachers"][-1]["head"] == "replaced"
    assert after[0].count("taken from the cache") == cached
    assert (before[1:] == after[1:]) == (cached > 0)


@pytest.mark.parametrize(("accuracies", "warned"), [([50, 70, 80, 86], True), ([50, 80, 84, 86], False)])
def test_teacher_that_is_still_learning_is_reported(accuracies: list[float], warned: bool):
    curve = [
        Epoch(
            stage="teacher", epoch=number, epochs=4, images_per_second=1, learning_rate=0.1, losses={},
            metrics={}, train_accuracy=accuracy, val_accuracy=None, seconds=1, time_fractions={},
        )
        for number, accuracy in enumerate(accuracies, 1)
    ]  # fmt: skip
    warnings: list[str] = []
    context = SimpleNamespace(display=SimpleNamespace(warn=warnings.append))
    stages_teacher._check_finished_learning(context, SimpleNamespace(name="resnet50"), curve)  # type: ignore[arg-type]
    expected = [
        "resnet50 was still learning when its 4 epochs ended: 80.0 → 86.0 % of the training views in the "
        "last quarter. Try --teacher-epochs 8, or a higher --teacher-lr"
    ]
    assert warnings == (expected if warned else [])


def test_learning_rate_is_doubted_while_the_loss_is_not_below_guessing():
    notes: list[str] = []
    context = SimpleNamespace(
        task=load_task("classification"), num_classes=10, display=SimpleNamespace(warn=notes.append)
    )
    spec = SimpleNamespace(name="resnet18")
    _check_loss(context, "student", spec, 100, 2.2, 0.001)  # type: ignore[arg-type]
    assert notes == []
    _check_loss(context, "teacher", spec, 100, 2.31, 0.001)  # type: ignore[arg-type]
    assert notes == [
        "after 100 steps the loss of resnet18 on labels is 2.31, not below the 2.3 of guessing: the learning "
        "rate 0.001 may be wrong. Try --teacher-lr 0.0002 or 0.005"
    ]
