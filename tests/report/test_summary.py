"""The first screen of a report never flatters: slower is slower, noise is noise."""

import pytest
from questpress.export.results import DeviceBench
from questpress.pipeline.report import summary
from questpress.pipeline.report.networks import all_networks, compare_speed
from questpress.pipeline.runs.results import Report
from questpress.pipeline.runs.scores import Score

from tests.support import reports


def with_int8(**changes: object) -> Report:
    report = reports.full()
    assert report.student_int8 is not None
    return report.model_copy(
        update={"student_int8": report.student_int8.model_copy(update=changes), "warnings": []}
    )


def test_key_figures_are_size_speed_and_accuracy_of_the_int8_file() -> None:
    report = reports.full()
    size, speed, score = summary.key_figures(report)
    assert (size.value, size.meaning) == ("33.4×", "smaller than the teacher")
    assert "2.55 MB vs. 85.1 MB" in size.details
    assert (speed.value, speed.meaning) == ("18.2×", "faster than the teacher, 1 thread")
    assert "95 % interval 17.9–18.5×, paired" in speed.details
    assert "2 threads: 13.7× faster (13.1–14.4×)" in speed.details
    assert report.student_int8 is not None and report.student_int8.score is not None
    assert score.value == f"{report.student_int8.score.percent:.1f} %"
    assert f"of {report.student_int8.score.n} test images correct" in score.details[1]
    assert any(line.startswith("student fp32 ") for line in score.details)
    assert any(line.startswith("teacher ") for line in score.details)


def device_bench(processor: str, waited: tuple[str, ...] = (), **p50: float) -> DeviceBench:
    timings = [
        {
            "name": f"student.{name}.onnx", "sha256": "0", "bytes": 1, "precision": name, "target": None,
            "threads": 1, "n": 9, "latency_ms": {"p50": {"value": value, "low": value, "high": value}},
            "processor_ms": value, "load_ms": 1.0, "end_to_end_ms": {},
        }
        for name, value in p50.items()
    ]  # fmt: skip
    flags = [
        {"name": "neighbor", "file": f"student.{name}.onnx", "threads": 1, "sentence": "Waited."}
        for name in waited
    ]
    device = {
        "processor": processor, "machine": "", "flags": [], "cores": 4, "memory_bytes": None,
        "system": "Linux",
    }  # fmt: skip
    return DeviceBench.model_validate(
        {
            "bench_version": 1, "device": device, "versions": {}, "provider": "CPUExecutionProvider",
            "seconds": 1.0, "images": "photos", "results": timings, "flags": flags,
        }
    )  # fmt: skip


def test_slowest_of_several_devices_is_named() -> None:
    pi = device_bench("Pi 5", int8=12.0, fp32=30.0)
    # Its int8 file is the fastest, but had to wait for other processes.
    board = device_bench("Board", ("int8",), int8=8.0, fp32=20.0)
    report = reports.full().model_copy(update={"devices": [pi, board]})
    details = summary.key_figures(report)[1].details
    assert details[-1] == "slowest of 2 devices: Board, p50 20.0 ms, fp32, 1 thread"
    single = [[pi], [pi, device_bench("Board", ("int8",), int8=8.0)]]
    for devices in single:
        report = reports.full().model_copy(update={"devices": devices})
        assert not any("devices" in line for line in summary.key_figures(report)[1].details)


def test_slower_int8_file_is_called_slower() -> None:
    report = with_int8(speedups=[reports.speedup("teacher", 1, 0.8, 0.78, 0.82)])
    _, speed, _ = summary.key_figures(report)
    assert (speed.value, speed.meaning) == ("1.25×", "slower than the teacher, 1 thread")
    assert "95 % interval 1.22–1.28×, paired" in speed.details
    assert summary.warnings(report) == [
        "Student int8 is not faster than the teacher on this machine: 1.25× slower (1.22–1.28×) with "
        "1 thread."
    ]


def test_difference_within_noise_is_not_called_faster() -> None:
    report = with_int8(speedups=[reports.speedup("student", 1, 1.02, 0.99, 1.05)])
    [warning] = [w for w in summary.warnings(report) if "not faster than the student fp32" in w]
    assert "no significant difference" in warning
    report = with_int8(speedups=[reports.speedup("teacher", 1, 1.02, 0.99, 1.05)])
    assert summary.key_figures(report)[1].meaning.startswith("no significant difference in speed from")


def test_ratio_of_medians_is_marked_as_such() -> None:
    _, speed, _ = summary.key_figures(with_int8(speedups=[]))
    assert speed.value == "18.2×"
    assert "ratio of medians, no paired interval" in speed.details


def test_larger_file_is_called_larger() -> None:
    size, _, _ = summary.key_figures(with_int8(bytes=170_292_000))
    assert (size.value, size.meaning) == ("2.00×", "larger than the teacher")


def test_lost_accuracy_and_wide_intervals_are_warnings() -> None:
    report = with_int8(score=reports.accuracy(30, 50))
    [loss] = [w for w in summary.warnings(report) if w.startswith("Quantization reduces accuracy by ")]
    assert "compress export RUN --qat" in loss and "--file student.onnx" in loss
    assert any(w.startswith("The accuracy is uncertain: on 50 test images") for w in summary.warnings(report))
    tuned = report.model_copy(update={"config": {"qat": True}})
    [loss] = [w for w in summary.warnings(tuned) if w.startswith("Quantization reduces")]
    assert "--qat" not in loss and "--file student.onnx" in loss


def test_perfect_map_of_a_few_images_is_called_uncertain() -> None:
    report = with_int8(score=Score(metric="mAP", percent=100, low=100, high=100, n=9))
    assert any("equal in every resample of 9 test images" in w for w in summary.warnings(report))


def test_run_without_a_teacher_is_not_called_distilled() -> None:
    report = reports.without("teacher", "teachers").model_copy(update={"method": "none"})
    assert summary.title(report) == "mobilenetv2_100, trained without a teacher"
    assert summary.key_figures(report)[0].value == "2.55 MB"
    assert summary.key_figures(report)[1].meaning == "faster than the fp32 student, 1 thread"


def test_warnings_of_the_run_come_first() -> None:
    report = reports.full()
    assert summary.warnings(report)[0] == report.warnings[0]


def test_machine_is_described_in_one_line() -> None:
    assert summary.describe_machine(reports.full().environment) == (
        "AMD EPYC 9555 64-Core Processor · 2 cores · Linux 6.8 · ONNX Runtime 1.27.0"
    )
    assert summary.describe_machine({}) is None


def test_teachers_of_an_ensemble_are_compared_one_by_one() -> None:
    report = with_int8(speedups=[reports.speedup("teacher 1", 1, 17.0, 16.5, 17.5)])
    assert report.teacher is not None
    ensemble = report.teacher.model_copy(update={"name": "both", "latency_ms": {}})
    report = report.model_copy(update={"teachers": [report.teachers[0]] * 2, "teacher": ensemble})
    columns = all_networks(report)
    assert [column.role for column in columns[:3]] == ["Teacher 0", "Teacher 1", "Teacher ensemble"]
    assert summary.title(report) == "mobilenetv2_100 distilled from 2 × resnet34"
    assert summary.key_figures(report)[1].meaning == "faster than the fp32 student, 1 thread"
    ratios = [compare_speed(columns[-1], teacher, "1") for teacher in columns[:3]]
    assert [ratio and ratio.text for ratio in ratios] == [
        "18.2× faster, no interval",
        "17.0× faster (16.5–17.5×)",
        None,
    ]


@pytest.mark.parametrize(("part", "missing"), [("student_int8", "int8 file"), ("student", None)])
def test_missing_parts_are_listed(part: str, missing: str | None) -> None:
    assert summary.list_missing(reports.without(part)) == ([missing] if missing else [])
