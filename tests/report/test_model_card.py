import re
from typing import Any

import pytest
import yaml
from questpress.export.runtime import Preprocessing
from questpress.pipeline.report.model_card import card
from questpress.pipeline.runs.results import Recovery

from tests.support.pages import HOSTILE
from tests.support import int8_reports, reports


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
            "licences": ["apache-2.0"],
        },
        "versions": {"onnxruntime": "1.31.1", "questpress": "0.1.0"},
        "files": [file("student.int8.onnx", "int8", "x86-vnni"), file("student.onnx", "fp32", None)],
        **more,
    }


def front(text: str) -> dict[str, Any]:
    _, written, _ = text.split("---\n", 2)
    found = yaml.safe_load(written)
    assert isinstance(found, dict)
    return found


def test_license_is_that_of_the_weights_it_was_made_from() -> None:
    assert front(card(reports.full(), manifest()))["license"] == "apache-2.0"
    several = manifest()
    several["origin"]["licences"] = ["apache-2.0", "CC BY-NC 4.0"]
    assert front(card(reports.full(), several))["license"] == "other"
    unknown = manifest()
    unknown["origin"]["licences"] = []
    text = card(reports.full(), unknown)
    assert "license" not in front(text) and "# license: not known" in text


def test_data_of_the_hub_is_named_and_a_folder_is_not() -> None:
    report = reports.full()
    assert "datasets" not in front(card(report, manifest()))
    report.config["data"] = "hfds/uoft-cs/cifar10"
    assert front(card(report, manifest()))["datasets"] == ["uoft-cs/cifar10"]


def test_card_tells_accuracy_latency_and_their_intervals() -> None:
    text = card(reports.full(), manifest())
    report = reports.full()
    assert report.student_int8 is not None and report.student_int8.score is not None
    correct, n = report.student_int8.score.correct, report.student_int8.score.n
    assert f"| Student int8 | {100 * correct / n:.1f} % |" in text and f"{correct} of {n}" in text
    assert "Student int8 against teacher, 1 thread: 18.2× faster (17.9–18.5×)." in text
    assert "| Student int8 | 1 | 0.684 ms |" in text


def test_before_the_bench_the_card_says_that_latency_is_not_measured() -> None:
    report = reports.full()
    for one in (report.teacher, report.student, report.student_int8):
        assert one is not None
        one.latency_ms.clear()
    assert "Not measured yet." in card(report, manifest())


def test_same_run_gives_the_same_bytes() -> None:
    assert card(reports.full(), manifest()) == card(reports.full(), manifest())


def test_pi_is_reported_which_file_answers() -> None:
    assert "so the fp32 file answers; compress export RUN --target arm64 makes one" in card(
        reports.full(), manifest()
    )
    arm = manifest()
    arm["files"].insert(1, arm["files"][0] | {"name": "student.int8.arm64.onnx", "target": "arm64"})
    assert "There student.int8.arm64.onnx answers" in card(reports.full(), arm)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_program_takes_what_the_file_takes(pixels: bool, several: bool) -> None:
    more: dict[str, Any] = {"input": "uint8"} if pixels else {}
    if several:
        more |= {"task": "multi-label", "thresholds": [0.5] * 10}
    text = card(reports.full(), manifest(**more))
    [source] = re.findall(r"```cpp\n(.*?)\n```", text, re.S)
    assert ("CreateTensor<uint8_t>" in source) == pixels
    assert ("MEAN" in source) == (not pixels)
    assert ("1 / (1 + std::exp(-one))" in source) == several
    assert "{{" not in source and "{%" not in source
    assert ("Feed the pixels as they are" in text) == pixels


def test_hostile_names_stay_text() -> None:
    report = reports.full(HOSTILE)
    assert report.data is not None
    report.data.name = HOSTILE[1]
    odd = manifest(labels=HOSTILE)
    odd["origin"] |= {"data": "a: [b\n---\n# c", "licences": ["x: y\n---\n# z", "b"]}
    text = card(report, odd)
    found = front(text)
    [model] = found["model-index"]
    assert model["results"][0]["dataset"]["name"] == "a: [b --- # c"
    body = text.split("---\n", 2)[2]
    prose = re.sub(r"```.*?```", "", body, flags=re.S)
    assert "<script" not in prose and "<img" not in prose
    assert sum(line.startswith("# ") for line in prose.splitlines()) == 1


def test_thousand_classes_are_counted_and_not_listed() -> None:
    text = card(reports.full(), manifest(labels=[f"class {i}" for i in range(1000)]))
    assert "class 39, … 1,000 in all" in text and "class 40," not in text


def test_several_rounds_are_reported() -> None:
    report = reports.full()
    assert "Rounds" not in card(report, manifest())
    report.config["rounds"] = 3
    assert "Rounds: 3, each with a new student" in card(report, manifest())


def test_weights_that_are_not_the_float_files_are_reported() -> None:
    report = int8_reports.with_int8()
    assert "fake quantization" not in card(report, manifest()) and "mean over" not in card(report, manifest())
    search = report.int8[0]
    learned = [one.model_copy(update={"name": "learned"}) if one.ships else one for one in search.tried]
    recovery = Recovery(epochs=1, fake_val=90.0, fake_test=90.0, file="qat/student.onnx")
    taught = report.model_copy(
        update={"int8": [search.model_copy(update={"tried": learned})], "recovery": recovery}
    )
    taught.config["ema"] = 0.9
    text = " ".join(card(taught, manifest()).split())
    assert "learned on for 1 epoch under fake quantization" in text and "a mean over the last part" in text
