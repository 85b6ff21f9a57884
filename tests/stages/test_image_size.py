"""Sizes of the input: a student with smaller images than its teacher (CQKD), and rectangles."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image as PillowImage
from questpress.export.runtime import Classifier
from questpress.pipeline.config import recipes
from questpress.pipeline.data.decode import Canonical, decode_images
from questpress.pipeline.data.render import Views
from questpress.pipeline.data.views import ViewPolicy, draw_crops
from torch.nn.functional import interpolate

from tests.support import little
from tests.support.little import compress, job, refused, report
from tests.support.pictures import in_memory, smooth

SMALLER = ("--student-size", "12", "--method", "quest+kd", "--precision", "fp32")


def tall_photos(root: Path) -> Path:
    """Write gray pictures of 64 × 24 pixels whose upper quarter has the color of the class."""
    for label, name in enumerate(little.CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.random.default_rng([label, number]).integers(60, 100, (64, 24, 3)).astype(np.uint8)
            pixels[:16, :, 2 - label] = 250
            PillowImage.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tall_photos(tmp_path_factory.mktemp("tall"))


def test_rectangle_reaches_every_file_and_command(tall: Path, tmp_path: Path, cache: Path) -> None:
    out, sizes = tmp_path / "run", ("--image-size", "32,12", "--student-size", "24x9")
    more = ("--method", "quest+kd", "--resize", "pad", "--teacher-epochs", "6", "--no-flip")
    done = little.check_success(job(tall, out, cache, *sizes, *more))
    assert "center crop" not in done.output
    manifest = json.loads((out / "artifact" / "manifest.json").read_text())
    p = manifest["preprocessing"]
    assert (p["size"], p["resize"], p["crop_mode"]) == ([24, 9], [24, 9], "border")
    for file, sides in (("artifact/student.int8.onnx", [24, 9]), ("bench/teacher.onnx", [32, 12])):
        shape = onnx.load(out / file).graph.input[0].type.tensor_type.shape.dim
        assert [side.dim_value for side in shape[2:]] == sides
    results = report(out)
    assert (results["image_size"], results["teacher_image_size"]) == ([24, 9], [32, 12])
    assert results["data"]["shown"] == 100 and results["teacher"]["score"]["percent"] > 60
    assert "24 × 9 pixels (height × width) (teacher: 32 × 12" in (out / "report.md").read_text()
    validated = little.check_success(compress("validate", out, "--json", "--out", tmp_path / "v"))
    networks = {network["file"]: network for network in json.loads(validated.stdout)["networks"]}
    assert networks["student.int8.onnx"]["score"]["percent"] == results["student_int8"]["score"]["percent"]
    photo = next((tall / "red").iterdir())
    alone = [sys.executable, str(out / "artifact" / "predict.py"), str(photo), "--json"]
    prediction = json.loads(subprocess.run(alone, capture_output=True, text=True, check=True).stdout)
    assert prediction["top"][0]["label"] == Classifier.load(out).predict([photo])[0].label
    again = job(tall, out, cache, *sizes, *more, "--dry-run")
    assert "at 32x12 px" in little.check_success(again).output


def test_crops_that_hide_most_of_the_pictures_are_reported(tall: Path, tmp_path: Path, cache: Path) -> None:
    for resize in ("crop", "squash"):
        more = ("--until", "teacher", "--resize", resize, "--image-size", "24", "--student-size", "12")
        done = little.check_success(
            job(tall, tmp_path / resize, cache, *more, "--no-flip", "--teacher-epochs", "6")
        )
        results = report(tmp_path / resize)
        warned = [w for w in results["warnings"] if "hides more than half of the picture in 100%" in w]
        assert len(warned) == (resize == "crop") == done.output.count("Warning: The center crop hides")
        page = (tmp_path / resize / "report.md").read_text()
        if resize == "crop":
            assert "62% of the median picture" in warned[0]
            assert "--image-size HEIGHT,WIDTH (40,16 has" in warned[0]
            assert results["data"]["shown"] == pytest.approx(37.5)
            assert "The input shows 37.5 % of the median image; --resize" in page
        else:
            assert results["teacher"]["score"]["percent"] > 60
            assert "The input shows 100.0 % of the median image." in page


@pytest.fixture(scope="module")
def smaller(data: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with a teacher of 16 pixels in every step and a student of 12."""
    out = tmp_path_factory.mktemp("runs") / "smaller"
    little.check_success(job(data, out, cache, *SMALLER, "--cache-views", "0"))
    return out


def test_everything_that_ships_is_of_the_students_size(smaller: Path, data: Path) -> None:
    for name in ("student.onnx", "student.int8.onnx"):
        shape = onnx.load(smaller / "artifact" / name).graph.input[0].type.tensor_type.shape.dim
        assert [side.dim_value for side in shape[2:]] == [12, 12]
    manifest = json.loads((smaller / "artifact" / "manifest.json").read_text())
    assert manifest["preprocessing"]["size"] == 12
    teacher = onnx.load(smaller / "bench" / "teacher.onnx").graph.input[0].type.tensor_type.shape.dim
    assert teacher[2].dim_value == 16
    photo = next((data / "red").iterdir())
    assert Classifier.load(smaller).predict([photo])[0].label in little.CLASSES
    results = report(smaller)
    assert (results["image_size"], results["teacher_image_size"]) == (12, 16)
    assert results["student"]["score"]["n"] == results["teacher"]["score"]["n"]
    assert "12 × 12 pixels (teacher: 16 × 16 pixels)" in (smaller / "report.md").read_text()


def test_cached_outputs_depend_on_the_teachers_size(data: Path, tmp_path: Path) -> None:
    """Students of all sizes read the same cached outputs."""
    options = (
        *(*little.NETWORKS, *little.SMALL, *little.SHORT, "--data", data, "--cache", tmp_path / "cache"),
        *("--cache-views", "2", "--method", "kd", "--precision", "fp32", "--until", "student"),
    )
    for size in ("16", "12", "8"):
        little.check_success(compress(*options, "--student-size", size, "--out", tmp_path / size))
    assert [report(tmp_path / size)["teacher_cache"]["computed"] for size in ("16", "12", "8")] == [2, 0, 0]
    assert "student-size" not in json.dumps(little.record(tmp_path / "16")["config"])


def test_run_with_all_views_cached_equals_an_online_run(tmp_path: Path, cache: Path) -> None:
    """With a single distinct view, cached and online outputs are the same."""
    photos = little.photos(tmp_path / "photos")
    one_view = (*SMALLER, "--crop", "center", "--no-flip", "--balance", "off", "--set", "quest.top=8")
    for name, views in (("stored", "1"), ("online", "0")):
        until = ("--until", "student")
        little.check_success(job(photos, tmp_path / name, cache, *one_view, "--cache-views", views, *until))
    stored, online = (
        [epoch["losses"]["kd"] for epoch in report(tmp_path / name)["epochs"] if epoch["stage"] == "student"]
        for name in ("stored", "online")
    )
    assert stored == pytest.approx(online, rel=1e-3)


@pytest.mark.parametrize("kind", ["pad_crop", "resized_crop"])
def test_student_sees_the_teachers_crop_scaled_down(kind: str) -> None:
    policy = (
        ViewPolicy("pad_crop", side=32, crop=32, pad=4) if kind == "pad_crop" else ViewPolicy("resized_crop")
    )
    form = Canonical("fixed", 32) if kind == "pad_crop" else Canonical("short_side", 48)
    done = decode_images(in_memory([smooth(n, 70, 50) for n in range(6)]), form)
    views = Views(done.labels, done.keys, policy, 3, 32, done.pixels)
    indices, numbers = torch.arange(6), torch.full((6,), 5)
    small, full = views.batch(indices, numbers, sizes=(16,))[0], views.batch(indices, numbers)[0]
    down = interpolate(full.float(), (16, 16), mode="bilinear", antialias=True)
    # One reduction or two: the same content, a little less sharp.
    assert (small.float() - down).abs().mean() < (0.51 if kind == "pad_crop" else 2.0)
    pixels = done.pixels
    box, _ = draw_crops(policy, 3, done.keys, numbers, pixels.heights, pixels.widths)
    assert len({tuple(row) for row in box.tolist()}) > 1, "all crops are equal"


def test_student_of_larger_images_is_refused(data: Path, tmp_path: Path, cache: Path) -> None:
    result = job(data, tmp_path / "run", cache, "--student-size", "20")
    refused(result, 2, "--student-size 20", "--image-size 16")
    assert not (tmp_path / "run").exists()


def test_recipe_is_the_papers() -> None:
    chosen = recipes.load_recipe("cqkd-imagenet").options
    assert (chosen["image_size"], chosen["student_size"], chosen["epochs"]) == (224, 112, 20)
    assert (chosen["optimizer"], chosen["schedule"], chosen["lr"]) == ("adamw", "onecycle", 1e-3)
    assert chosen["settings"] == {"kd.tau": 20.0, "kd.weight": 0.5} and chosen["weight"] == {"ce": 0.5}


def test_estimate_counts_the_students_own_size(data: Path, tmp_path: Path) -> None:
    options = (*little.NETWORKS, *little.SMALL, "--data", data, "--out", tmp_path / "run", "--dry-run")
    outputs = {size: compress(*options, "--student-size", size).output for size in ("16", "8")}
    assert "at 16 px, " in outputs["16"] and "at 8 px, " in outputs["8"]
