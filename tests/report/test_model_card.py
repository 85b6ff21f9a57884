import re
from typing import Any

import pytest
import yaml
from questpress.export.runtime import Preprocessing
from questpress.pipeline.report.run_report import model_card
from questpress.pipeline.runs.results import Recovery

from tests.support import bench_reports, int8_reports, reports
from tests.support.pages import HOSTILE


def manifest(labels: list[str] | None = None, **more: Any) -> dict[str, Any]:
    def file(name: str, precision: str, target: str | None) -> dict[str, Any]:
        accuracy = {"top1": 84.1, "n": 371, "low": 80.0, "high": 87.5, "correct": 312}
        described = {"bytes": 2_548_907, "sha256": "41ae" * 16, "opset": 20, "ir_version": 10}
        return {"name": name, "precision": precision, "target": target, "accuracy": accuracy, **described}

    return {
        "preprocessing": Preprocessing.create(96, 0.875, "bicubic").to_dict(),
        "labels": labels or reports.GARMENTS,
        "origin": {
            "student": "mobilenetv2_100",
            "student_weights": "scratch",
            "teachers": [{"name": "resnet34", "weights": "pretrained"}],
            "method": "quest",
            "data": "clothing",
            "licenses": ["apache-2.0"],
        },
        "versions": {"onnxruntime": "1.31.1", "questpress": "0.1.0"},
        "files": [file("student.int8.onnx", "int8", "x86-vnni"), file("student.onnx", "fp32", None)],
        **more,
    }


def read_metadata(text: str) -> dict[str, Any]:
    _, written, _ = text.split("---\n", 2)
    content = yaml.safe_load(written)
    assert isinstance(content, dict)
    return content


def test_license_is_that_of_the_initial_weights() -> None:
    assert read_metadata(model_card(reports.full(), manifest()))["license"] == "apache-2.0"
    unlisted = manifest()
    unlisted["origin"]["licenses"] = ["SEER license"]
    content = read_metadata(model_card(reports.full(), unlisted))
    assert (content["license"], content["license_name"]) == ("other", "seer-license")
    several = manifest()
    several["origin"]["licenses"] = ["apache-2.0", "CC BY-NC 4.0"]
    assert read_metadata(model_card(reports.full(), several))["license"] == "other"
    unknown = manifest()
    unknown["origin"]["licenses"] = []
    text = model_card(reports.full(), unknown)
    assert "license" not in read_metadata(text) and "# license: unknown" in text


def test_only_data_of_the_hub_is_named() -> None:
    report = reports.full()
    assert "datasets" not in read_metadata(model_card(report, manifest()))
    report.config["data"] = "hfds/uoft-cs/cifar10"
    assert read_metadata(model_card(report, manifest()))["datasets"] == ["uoft-cs/cifar10"]


def test_card_has_accuracy_latency_and_intervals() -> None:
    report = bench_reports.with_bench()
    text = model_card(report, manifest())
    assert report.student_int8 is not None and (score := report.student_int8.score) is not None
    assert f"| Student int8 | {score.percent:.1f} % |" in text and f"{score.correct} of {score.n}" in text
    assert "Student int8 vs. teacher, 1 thread: 18.2× faster (17.9–18.5×)." in text
    assert "| Student int8 | 1 | 0.688 (0.686–0.689) |" in text


def test_card_without_a_bench_has_no_latency() -> None:
    assert "Not measured yet." in model_card(reports.full(), manifest())


def test_card_is_deterministic() -> None:
    assert model_card(reports.full(), manifest()) == model_card(reports.full(), manifest())


def test_raspberry_pi_section_names_the_file() -> None:
    assert "so the fp32 file is used; `compress export RUN --target arm64` makes one" in model_card(
        reports.full(), manifest()
    )
    arm = manifest()
    arm["files"].insert(1, arm["files"][0] | {"name": "student.int8.arm64.onnx", "target": "arm64"})
    assert "It uses student.int8.arm64.onnx" in model_card(reports.full(), arm)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_program_matches_the_input_and_the_task(pixels: bool, several: bool) -> None:
    more: dict[str, Any] = {"input": "uint8"} if pixels else {}
    if several:
        more |= {"task": "multi-label", "thresholds": [0.5] * 10}
    text = model_card(reports.full(), manifest(**more))
    [source] = re.findall(r"```cpp\n(.*?)\n```", text, re.S)
    assert ("CreateTensor<uint8_t>" in source) == pixels
    assert ("MEAN" in source) == (not pixels)
    assert ("1 / (1 + std::exp(-x))" in source) == several
    assert (f"THRESHOLDS[] = {{{', '.join(['0.5'] * 10)}}};" in source) == several
    assert ("if (p[i] >= THRESHOLDS[i])" in source) == several != ("Apply a softmax" in text)
    assert ("Apply a sigmoid to each of the `logits`" in text) == several
    assert "{{" not in source and "{%" not in source
    assert ("Pass the pixels as uint8" in text) == pixels


def test_hostile_names_are_text() -> None:
    report = reports.full(HOSTILE)
    assert report.data is not None
    report.data.name = HOSTILE[1]
    odd = manifest(labels=HOSTILE)
    odd["origin"] |= {"data": "a: [b\n---\n# c", "licenses": ["x: y\n---\n# z", "b"]}
    text = model_card(report, odd)
    [model] = read_metadata(text)["model-index"]
    assert model["results"][0]["dataset"]["name"] == "a: [b --- # c"
    body = text.split("---\n", 2)[2]
    prose = re.sub(r"```.*?```", "", body, flags=re.S)
    assert "<script" not in prose and "<img" not in prose
    assert sum(line.startswith("# ") for line in prose.splitlines()) == 1


def test_long_list_of_classes_is_cut() -> None:
    text = model_card(reports.full(), manifest(labels=[f"class {i}" for i in range(1000)]))
    assert "class 39, … 1,000 in total" in text and "class 40," not in text


def test_rounds_are_described() -> None:
    report = reports.full()
    assert "Rounds" not in model_card(report, manifest())
    report.config["rounds"] = 3
    assert "Rounds: 3. The student of each round" in model_card(report, manifest())


def test_tuned_and_averaged_weights_are_described() -> None:
    report = int8_reports.with_int8()
    assert "fake quantization" not in model_card(report, manifest()) and "an average over" not in model_card(
        report, manifest()
    )
    search = report.int8[0]
    learned = [c.model_copy(update={"name": "learned"}) if c.ships else c for c in search.tried]
    recovery = Recovery(epochs=1, fake_val=90.0, fake_test=90.0, file="qat/student.onnx")
    taught = report.model_copy(
        update={"int8": [search.model_copy(update={"tried": learned})], "recovery": recovery}
    )
    taught.config["ema"] = 0.9
    text = " ".join(model_card(taught, manifest()).split())
    assert "fine-tuned for 1 epoch with fake quantization" in text and "an average over the last part" in text
