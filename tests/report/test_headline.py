from questpress.export.latency.results import Speedup
from questpress.pipeline.report import summary
from questpress.pipeline.report.pages.run import page
from questpress.pipeline.runs.results import Report
from questpress.pipeline.runs.scores import Score

from tests.support import reports


def with_int8(**changes: object) -> Report:
    report = reports.full()
    assert report.student_int8 is not None
    return report.model_copy(
        update={"student_int8": report.student_int8.model_copy(update=changes), "warnings": []}
    )


def test_the_three_figures_are_size_speed_and_accuracy_of_the_int8_file() -> None:
    smaller, faster, accurate = summary.key_figures(reports.full())
    assert (smaller.value, smaller.meaning) == ("33.4×", "smaller than the teacher")
    assert "2.55 MB instead of 85.1 MB" in smaller.lines
    assert (faster.value, faster.meaning) == ("18.2×", "faster than the teacher, 1 thread")
    assert "95 % interval 17.9–18.5×, paired" in faster.lines
    assert "2 threads: 13.7× faster (13.1–14.4×)" in faster.lines
    report = reports.full()
    assert report.student_int8 is not None and report.student_int8.score is not None
    assert accurate.value == f"{report.student_int8.score.percent:.1f} %"
    assert f"of {report.student_int8.score.n} test images" in accurate.lines[1]
    assert any(line.startswith("student fp32 ") for line in accurate.lines)
    assert any(line.startswith("teacher ") for line in accurate.lines)


def test_a_slower_int8_file_is_called_slower() -> None:
    report = with_int8(speedups=[Speedup(subject="student_int8", over="teacher", threads=1, ratio=0.8, low=0.78, high=0.82)])
    _, faster, _ = summary.key_figures(report)
    assert (faster.value, faster.meaning) == ("1.25×", "slower than the teacher, 1 thread")
    assert "95 % interval 1.22–1.28×, paired" in faster.lines
    (note,) = summary.notes(report)
    assert note == (
        "Student int8 is not faster than teacher on this machine: 1.25× slower (1.22–1.28×) with 1 thread."
    )


def test_a_difference_within_noise_is_not_called_faster() -> None:
    report = with_int8(speedups=[Speedup(subject="student_int8", over="student", threads=1, ratio=1.02, low=0.99, high=1.05)])
    told = summary.notes(report)
    assert any("not faster than student fp32" in note and "no measurable difference" in note for note in told)
    report = with_int8(speedups=[Speedup(subject="student_int8", over="teacher", threads=1, ratio=1.02, low=0.99, high=1.05)])
    assert summary.key_figures(report)[1].meaning.startswith("the speed: no measurable difference")


def test_without_a_paired_interval_the_ratio_of_medians_says_so() -> None:
    _, faster, _ = summary.key_figures(with_int8(speedups=[]))
    assert faster.value == "18.2×"
    assert "ratio of two medians; no paired interval was measured" in faster.lines


def test_a_larger_file_is_called_larger() -> None:
    smaller, _, _ = summary.key_figures(with_int8(bytes=170_292_000))
    assert (smaller.value, smaller.meaning) == ("2.00×", "larger than the teacher")


def test_lost_accuracy_and_a_wide_interval_are_noted() -> None:
    told = summary.notes(with_int8(score=reports.accuracy(30, 50)))
    [costs] = [note for note in told if note.startswith("Quantization costs accuracy: −")]
    assert "compress export RUN --qat" in costs and "--file student.onnx" in costs
    learned = with_int8(score=reports.accuracy(30, 50)).model_copy(update={"config": {"qat": True}})
    [costs] = [note for note in summary.notes(learned) if note.startswith("Quantization costs")]
    assert "--qat" not in costs and "--file student.onnx" in costs
    assert any(note.startswith("On 50 test images the accuracy is uncertain") for note in told)


def test_a_run_without_a_teacher_is_not_called_distilled() -> None:
    report = reports.without("teacher", "teachers").model_copy(update={"method": "none"})
    assert summary.title(report) == "mobilenetv2_100, trained without a teacher"
    assert summary.key_figures(report)[0].value == "2.55 MB"
    assert summary.key_figures(report)[1].meaning == "faster than its own fp32 file, 1 thread"


def test_warnings_of_the_run_come_first() -> None:
    report = reports.full()
    assert summary.notes(report)[0] == report.warnings[0]


def test_the_machine_is_told_in_one_line() -> None:
    assert summary.machine(reports.full()) == (
        "AMD EPYC 9555 64-Core Processor · 2 cores · Linux 6.8 · ONNX Runtime 1.27.0"
    )
    assert summary.machine(reports.bare()) is None


def test_confident_mistakes_are_the_first_examples() -> None:
    shown = page(reports.full()).examples
    wrong = [one for one in shown if not one.student_right]
    assert shown[: len(wrong)] == wrong
    sure = [float(one.student_probability.split()[0]) for one in wrong]
    assert sure == sorted(sure, reverse=True)


def test_several_teachers_stand_beside_their_ensemble() -> None:
    report = reports.full()
    assert report.teacher is not None and report.student_int8 is not None
    together = report.teacher.model_copy(update={"name": "both", "latency_ms": {}})
    over_second = Speedup(subject="student_int8", over="teacher 1", threads=1, ratio=17.0, low=16.5, high=17.5)
    int8 = report.student_int8.model_copy(update={"speedups": [over_second]})
    two = report.model_copy(
        update={"teachers": [report.teachers[0]] * 2, "teacher": together, "student_int8": int8}
    )
    shown = page(two)
    assert shown.comparison.columns[1:4] == ["Teacher 0", "Teacher 1", "All teachers"]
    assert shown.title == "mobilenetv2_100 distilled from 2 × resnet34"
    assert shown.key_figures[1].meaning == "faster than its own fp32 file, 1 thread"
    rows = {row[0]: row[1] for row in shown.speedups.rows}
    assert rows["Student int8 against teacher 0"] == "18.2× faster, without interval"
    assert rows["Student int8 against teacher 1"] == "17.0× faster (16.5–17.5×)"


def test_a_map_of_a_few_images_that_are_all_right_is_called_uncertain() -> None:
    report = reports.full()
    assert report.student_int8 is not None
    perfect = Score(metric="mAP", percent=100, low=100, high=100, n=9)
    int8 = report.student_int8.model_copy(update={"score": perfect})
    told = summary.notes(report.model_copy(update={"student_int8": int8}))
    assert any("On 9 test images" in note and "whatever its 95 % interval says" in note for note in told)
