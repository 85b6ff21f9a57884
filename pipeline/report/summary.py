"""The first screen of a report: what was made, three key figures, and warnings."""

from dataclasses import replace

from ..runs.results import Baseline, Report
from ..tasks import task_of
from . import format, networks
from .networks import Column
from .page import Bar, KeyFigure
from .sections import int8, latency

SMALL_TEST_SET = 1000
"""Number of test images below which an interval of zero width gets a warning."""
MAX_DETAILS = 2
"""Number of further metrics of the score, here and in the terminal."""
WIDE_INTERVAL = 10
"""Width in points from which an interval gets a warning."""


def title(report: Report) -> str:
    student = networks.find_network(report, "student") or networks.find_network(report, "student_int8")
    teacher = networks.find_network(report, "teacher")
    if student is None:
        return report.title
    if report.method == "none":
        return f"{student.subject.name}, trained without a teacher"
    if teacher is None:
        return student.subject.name
    names = [teacher.name for teacher in report.teachers] or [teacher.subject.name]
    return f"{student.subject.name} distilled from {format.join_names(names)}"


def lead(report: Report) -> str:
    """Return the shipped file and why, the method, the data, and how the file was measured."""
    sentences, student, data = [], report.student_int8, report.data
    if (reason := int8.explain_fp32(report)) is not None:
        sentences.append(reason)
    elif student is not None and student.file is not None:
        sentences.append(f"The int8 file ships: {student.file.rpartition('/')[2]}.")
    trained = "Trained without a teacher" if report.method == "none" else f"Trained with {report.method}"
    if data is not None:
        trained += f" on {data.name}: {format.plural(len(data.classes), 'class', 'classes')}"
        trained += task_of(data).labels_note
        trained += f", {data.train:,} training, {data.val:,} validation and {data.test:,} test images"
        if data.unlabeled:
            trained += f", and {format.plural(data.unlabeled, 'image')} without labels"
    trained += f" at {format.pixels(report.image_size)}"
    teacher_size = report.teacher_image_size
    if teacher_size is not None and teacher_size != report.image_size and report.method != "none":
        trained += f" (teacher: {format.pixels(teacher_size)})"
    sentences.append(f"{trained}.")
    if student is not None and student.score is not None:
        measured = format.title(networks.score_name(report))
        is_timed = any(measured_ms.p50 is not None for measured_ms in student.latency_ms.values())
        measured += " and latency were" if is_timed else " was"
        sentences.append(f"{measured} measured on the shipped file in ONNX Runtime.")
    return " ".join(sentences)


def key_figures(report: Report) -> list[KeyFigure]:
    """Return size, speed and accuracy of the shipped file, with dashes for what is not known yet."""
    speed = _speed(report)
    if (slowest := latency.slowest_device(report.devices)) is not None:
        speed = replace(speed, details=[*speed.details, slowest])
    return [_size(report), speed, _score(report)]


def _size(report: Report) -> KeyFigure:
    shipped, teacher = networks.shipped_network(report), networks.find_network(report, "teacher")
    if shipped is None or not shipped.subject.bytes:
        return KeyFigure(format.MISSING, "size not known yet")
    size, details = shipped.subject.bytes, []
    student = networks.find_network(report, "student")
    if shipped.key == "student_int8" and student is not None and student.subject.bytes:
        details.append(" ".join((*_compare_sizes(size, student.subject.bytes), "the fp32 student")))
    if teacher is None or not teacher.subject.bytes:
        return KeyFigure(format.megabytes(size), f"{shipped.role_in_sentence} file", details)
    other = teacher.subject.bytes
    ratio, meaning = _compare_sizes(size, other)
    return KeyFigure(
        ratio,
        f"{meaning} the teacher",
        [f"{format.megabytes(size)} vs. {format.megabytes(other)}", *details],
        _bars((teacher, other), (shipped, size)),
    )


def _bars(*values: tuple[Column, float]) -> list[Bar]:
    longest = max(value for _, value in values)
    return [Bar(column.short_role, column.key, round(100 * value / longest, 1)) for column, value in values]


def _compare_sizes(size: int, other: int) -> tuple[str, str]:
    meaning = "smaller than" if size < other else "larger than" if size > other else "the size of"
    return format.times(max(size, other) / min(size, other)), meaning


def _speed(report: Report) -> KeyFigure:
    shipped, teacher = networks.shipped_network(report), networks.find_network(report, "teacher")
    has_int8 = shipped is not None and shipped.key == "student_int8"
    fp32 = networks.find_network(report, "student") if has_int8 else None
    # An ensemble of teachers is not timed as one network: then the fp32 student is the reference.
    over, ratios = teacher, networks.speed_ratios(report, shipped, teacher)
    if not ratios:
        over, ratios = fp32, networks.speed_ratios(report, shipped, fp32)
    if not ratios or shipped is None or over is None:
        search = int8.default_search(report)
        if search is not None and search.file is not None and search.not_timed is not None:
            return KeyFigure(format.MISSING, "latency not measured", [search.not_timed])
        if report.bench is not None and report.bench.disturbed_threads:
            return KeyFigure(format.MISSING, "latency not reported: the measurement was disturbed")
        return KeyFigure(format.MISSING, "latency not measured yet")
    ratio, *others = ratios
    value, meaning = ratio.headline
    reference = "the teacher" if over is teacher else "the fp32 student"
    paired = f"95 % interval {ratio.interval}, paired"
    details, bars = [paired if ratio.interval else "ratio of medians, no paired interval"], []
    name, read = networks.latency_measure(report, ratio.threads)
    p50, other = read(shipped.subject), read(over.subject)
    if p50 is not None and other is not None:
        bars = _bars((over, other), (shipped, p50))
        details.append(
            f"{name.removesuffix(' latency')} {format.milliseconds(p50)} vs. {format.milliseconds(other)}"
        )
    details += [f"{format.threads(ratio.threads)}: {ratio.text}" for ratio in others]
    if over is teacher and (over_fp32 := networks.compare_speed(shipped, fp32, ratio.threads)) is not None:
        details.append(f"vs. fp32 student: {over_fp32.text}")
    return KeyFigure(value, f"{meaning} {reference}, {format.threads(ratio.threads)}", details, bars)


def _score(report: Report) -> KeyFigure:
    shipped, columns = networks.shipped_network(report), networks.compared_networks(report)
    others = [
        f"{column.role_in_sentence} {format.score(column.subject.score)}"
        for column in reversed(columns)
        if column.subject.score is not None and column != shipped
    ]
    score = shipped.subject.score if shipped is not None else None
    if shipped is None or score is None:
        others += [
            f"{column.role_in_sentence} {format.score(column.subject.val_score)} on validation images"
            for column in columns
            if column.subject.val_score is not None
        ]
        return KeyFigure(format.MISSING, f"test {networks.score_name(report)} not measured yet", others)
    images = format.plural(score.n, "test image")
    measures = [
        f"{name} {format.percent(value.percent, score.n)}"
        for name, value in list(score.details.items())[:MAX_DETAILS]
    ]
    details = [f"95 % interval {format.score_interval(score)}"]
    details.append(f"on {images}" if score.correct is None else f"{score.correct:,} of {images} correct")
    if report.baseline is not None:
        details.append(describe_baseline(report.baseline))
    return KeyFigure(
        format.score_percent(score),
        f"{networks.score_name(report)} of the {shipped.short_role} student",
        [*details, *measures, *others],
        [
            Bar(column.short_role, column.key, round(column.subject.score.percent, 1))
            for column in columns
            if column.subject.score is not None and column.key in ("teacher", shipped.key)
        ],
    )


def describe_baseline(baseline: Baseline) -> str:
    """Return what the teacher brought: the difference to the score of the student trained without it."""
    n, test = baseline.score.n, ""
    if baseline.low is not None and baseline.high is not None and baseline.p is not None:
        low, high = (format.points(value, n).partition(" ")[0] for value in (baseline.low, baseline.high))
        test = f" ({low} to {high}, {format.p_equals(baseline.p)})"
    return (
        f"the teacher brought {format.points(baseline.points, n)}{test}: without it "
        f"{format.score_percent(baseline.score)}, both fp32"
    )


def warnings(report: Report) -> list[str]:
    """Return the warnings of the run, then those that follow from its figures."""
    messages = [*report.warnings]
    if report.bench is not None and report.bench.disturbed_threads:
        messages.append(latency.noise_summary(report.bench, latency.repeat_command(report.bench, report)))
    elif report.bench is not None and report.bench.flags:
        more = "" if len(report.bench.flags) == 1 else " See Latency for more."
        messages.append(f"The latency measurement was disturbed. {report.bench.flags[0].sentence}{more}")
    messages += int8.warnings(report)
    headless = [teacher.name for teacher in report.teachers if teacher.head == "none"]
    if headless and report.method != "none":
        messages.append(
            f"{' and '.join(headless)} {'has' if len(headless) == 1 else 'have'} no classifier head: the "
            "student was trained on features only, and the teacher's accuracy is not defined."
        )
    shipped, student = networks.shipped_network(report), networks.find_network(report, "student")
    for column, over in (
        (networks.find_network(report, "student_int8"), student),
        (shipped, networks.find_network(report, "teacher")),
    ):
        ratios = networks.speed_ratios(report, column, over)
        slow = "; ".join(f"{r.text} with {format.threads(r.threads)}" for r in ratios if not r.is_faster)
        if slow and column is not None and over is not None:
            pair = f"{column.role} is not faster than the {over.role_in_sentence}"
            messages.append(f"{pair} on this machine: {slow}.")
    messages += _score_warnings(report, shipped, student)
    return list(dict.fromkeys(messages))


def _score_warnings(report: Report, shipped: Column | None, student: Column | None) -> list[str]:
    score = shipped.subject.score if shipped is not None else None
    if shipped is None or score is None:
        return []
    name, messages = networks.score_name(report), []
    if shipped.key == "student_int8" and student is not None and student.subject.score is not None:
        lost = student.subject.score.percent - score.percent
        if lost > 1:
            remedies = int8.suggest_remedies(bool(report.config.get("qat")))
            messages.append(f"Quantization reduces {name} by {format.points(lost, score.n)[1:]}. {remedies}")
    images, width, reason = format.plural(score.n, "test image"), score.high - score.low, ""
    if width > WIDE_INTERVAL:
        reason = f"on {images} its 95 % interval is {format.points(width)[1:]} wide"
    elif width == 0 and score.n < SMALL_TEST_SET:
        # Only a bootstrap has such intervals: of predictions that are all correct, or all wrong.
        reason = f"it is equal in every resample of {images}, so the bootstrap interval has no width"
    return [*messages, f"The {name} is uncertain: {reason}."] if reason else messages


def list_missing(report: Report) -> list[str]:
    """Return what a finished report contains and this one does not contain yet."""
    columns = networks.compared_networks(report)
    parts = {
        "student": report.student or report.student_int8,
        "int8 file": report.student_int8 or report.int8,
        f"test {networks.score_name(report)}": any(column.subject.score for column in columns),
        "latency": networks.thread_counts(report),
    }
    return [name for name, value in parts.items() if not value]


def describe_machine(environment: dict[str, str]) -> str | None:
    """Return processor, cores, operating system and ONNX Runtime in one line."""
    cores, runtime = environment.get("cores allowed"), environment.get("onnxruntime")
    parts = [
        environment.get("cpu"),
        cores and f"{cores} core{'' if cores == '1' else 's'}",
        environment.get("machine"),
        runtime and f"ONNX Runtime {runtime}",
    ]
    return " · ".join(part for part in parts if part) or None
