"""The first screen: what was made, three figures, and what must not be overlooked."""

from dataclasses import dataclass, field

from ..runs.results import Report
from ..runs.scores import Score
from ..tasks import task_of
from . import budget, format
from .networks import Column, Pace, compared, measure, of, pace, shipped, threads

FEW = 1000
"""Test images with which an interval without width means little."""


@dataclass(frozen=True)
class Bar:
    """One of two bars that a figure compares; ``share`` of the longer one, percent."""

    label: str
    key: str
    share: float


@dataclass(frozen=True)
class KeyFigure:
    """One of the big figures: ``value`` large, ``meaning`` under it, ``lines`` with the small print.

    ``bars`` show what ``lines`` say.
    """

    value: str
    meaning: str
    lines: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    @property
    def known(self) -> bool:
        return self.value != format.MISSING


def title(report: Report) -> str:
    student, teacher = of(report, "student") or of(report, "student_int8"), of(report, "teacher")
    if student is None:
        return report.title
    if report.method == "none":
        return f"{student.subject.name}, trained without a teacher"
    if teacher is None:
        return student.subject.name
    names = [one.name for one in report.teachers] or [teacher.subject.name]
    return f"{student.subject.name} distilled from {format.together(names)}"


def lead(report: Report) -> str:
    """A few sentences: first that the fp32 file ships, where no int8 file does; the method, the data, what
    ships.
    """
    fp32 = budget.fp32_ships(report)
    sentence = f"{fp32} " if fp32 else ""
    sentence += "Plain training" if report.method == "none" else f"Method {report.method}"
    data = report.data
    if data is not None:
        sentence += f" on {data.name}, {format.counted(len(data.classes), 'class', 'classes')}"
        sentence += f"{task_of(data).labels_note},"
    sentence += f" at {report.image_size} × {report.image_size} pixels"
    if report.teacher_image_size not in (None, report.image_size) and report.method != "none":
        sentence += f" (the teacher at {report.teacher_image_size} × {report.teacher_image_size})"
    if data is not None:
        sentence += f": {format.counted(data.train, 'image')} to train, {data.val:,} to val, "
        sentence += f"{data.test:,} to test"
    sentence += "."
    int8 = report.student_int8
    if int8 is not None and int8.score is not None:
        measured = f"{measure(report)} and latency were" if int8.latency_ms else f"{measure(report)} was"
        sentence += f" The int8 file ships; its {measured} measured on that very file, in ONNX Runtime."
    return sentence


def key_figures(report: Report) -> list[KeyFigure]:
    """Smaller, faster, accurate: always three, each saying so where it is not known yet."""
    return [_smaller(report), _faster(report), _accurate(report)]


def _smaller(report: Report) -> KeyFigure:
    ships, teacher, student = shipped(report), of(report, "teacher"), of(report, "student")
    if ships is None or not ships.subject.bytes:
        return KeyFigure(format.MISSING, "size not known yet")
    own = ships.subject.bytes
    lines = []
    if ships.key == "student_int8" and student is not None and student.subject.bytes:
        lines.append(f"{_size_against(own, student.subject.bytes)} its own fp32 file")
    if teacher is None or not teacher.subject.bytes:
        return KeyFigure(format.megabytes(own), f"the {ships.role.lower()} file", lines)
    theirs = teacher.subject.bytes
    lines.insert(0, f"{format.megabytes(own)} instead of {format.megabytes(theirs)}")
    ratio = theirs / own
    word = "smaller" if ratio > 1 else "larger" if ratio < 1 else "as large"
    bars = _bars((teacher, theirs), (ships, own))
    return KeyFigure(format.times(max(ratio, 1 / ratio)), f"{word} than the teacher", lines, bars)


def _bars(*measured: tuple[Column, float]) -> list[Bar]:
    longest = max(value for _, value in measured)
    return [Bar(column.short, column.key, round(100 * value / longest, 1)) for column, value in measured]


def _size_against(own: int, other: int) -> str:
    if own == other:
        return "as large as"
    return f"{format.times(max(own, other) / min(own, other))} {'smaller' if own < other else 'larger'} than"


def _faster(report: Report) -> KeyFigure:
    ships = shipped(report)
    over = of(report, "teacher")
    own_fp32 = of(report, "student") if ships is not None and ships.key == "student_int8" else None
    # Several teachers together are not timed as one: then its own fp32 file is what can be compared.
    measured: list[Pace] = []
    for base in (over, own_fp32):
        measured = measured or [one for n in threads(report) if (one := pace(ships, base, n)) is not None]
    if not measured or ships is None:
        search = budget.first(report)
        if search is not None and search.file is not None and search.not_timed is not None:
            return KeyFigure(format.MISSING, "latency not known", [search.not_timed])
        return KeyFigure(format.MISSING, "latency not measured yet")
    first = measured[0]
    value, word = speed(first)
    meaning = f"{word} {_reference(first)}, {format.threads(first.threads)}"
    lines = [_certainty(first)]
    own, other = ships.subject.latency_ms.get(first.threads), first.over.subject.latency_ms.get(first.threads)
    bars: list[Bar] = []
    if own is not None and other is not None and own.p50 is not None and other.p50 is not None:
        bars = _bars((first.over, other.p50), (ships, own.p50))
        lines.append(f"median {format.milliseconds(own.p50)} instead of {format.milliseconds(other.p50)}")
    lines += [f"{format.threads(one.threads)}: {in_words(one)}" for one in measured[1:]]
    if measured[0].over is over:
        against = pace(ships, own_fp32, first.threads)
        if against is not None:
            lines.append(f"against its own fp32: {in_words(against)}")
    return KeyFigure(value, meaning, lines, bars)


def speed(one: Pace) -> tuple[str, str]:
    """The ratio and its word, never a flattering one: a slower network is said to be slower."""
    if one.verdict == "no difference":
        return format.times(one.ratio), "the speed: no measurable difference from"
    if one.ratio < 1:
        return format.times(1 / one.ratio), "slower than"
    return format.times(one.ratio), "faster than"


def in_words(one: Pace) -> str:
    """8.40× faster (8.21–8.62×); no measurable difference (0.98–1.03×); 1.10× slower."""
    if one.low is None or one.high is None:
        value, word = speed(one)
        return f"{value} {word.split()[0]}, without interval"
    if one.verdict == "no difference":
        return f"no measurable difference ({format.times_interval(one.low, one.high)})"
    value, word = speed(one)
    return f"{value} {word.split()[0]} ({_interval(one)})"


def _interval(one: Pace) -> str:
    """In the direction of the word: of a slower network, the interval of how many times slower it is."""
    assert one.low is not None and one.high is not None
    if one.verdict == "slower":
        return format.times_interval(1 / one.high, 1 / one.low)
    return format.times_interval(one.low, one.high)


def _certainty(one: Pace) -> str:
    if one.low is None or one.high is None:
        return "ratio of two medians; no paired interval was measured"
    return f"95 % interval {_interval(one)}, paired"


def _reference(one: Pace) -> str:
    return "the teacher" if one.over.key == "teacher" else "its own fp32 file"


def _accurate(report: Report) -> KeyFigure:
    ships = shipped(report)
    others = [column for column in compared(report) if ships is not None and column.key != ships.key]
    if ships is None:
        others = compared(report)
    lines = [
        f"{column.role.lower()} {score_in_words(column.subject.score)}"
        for column in reversed(others)
        if column.subject.score is not None
    ]
    score = ships.subject.score if ships is not None else None
    if ships is None or score is None:
        lines += [_selected(c, c.subject.val_score) for c in compared(report) if c.subject.val_score]
        return KeyFigure(format.MISSING, f"{measure(report)} on test images not measured", lines)
    own = [f"95 % interval {format.percent_interval(score.low, score.high, score.n)}"]
    images = format.counted(score.n, "test image")
    own.append(f"on {images}" if score.correct is None else f"{score.correct:,} of {images}")
    own += [f"{name} {format.percent(one.percent, score.n)}" for name, one in score.details.items()]
    return KeyFigure(
        format.percent(score.percent, score.n),
        f"{measure(report)} of the {ships.role.lower()} file",
        own + lines,
        [
            Bar(column.short, column.key, round(column.subject.score.percent, 1))
            for column in compared(report)
            if column.subject.score is not None and column.key in ("teacher", ships.key)
        ],
    )


def score_in_words(score: Score | None) -> str:
    """97.2 % (93.7–98.8 %)."""
    if score is None:
        return format.MISSING
    interval = format.percent_interval(score.low, score.high, score.n)
    return f"{format.percent(score.percent, score.n)} ({interval})"


def _selected(column: Column, score: Score | None) -> str:
    return f"{column.role.lower()} {score_in_words(score)} on val images, before export"


def notes(report: Report) -> list[str]:
    """The run's warnings, then what the figures themselves give to think about."""
    found = [*report.warnings, *_restless(report), *budget.notes(report)]
    headless = [one.name for one in report.teachers if one.head == "none"]
    if headless and report.method != "none":
        found.append(
            f"{' and '.join(headless)} {'has' if len(headless) == 1 else 'have'} no head: the student "
            "learned from features alone, and a teacher without a head has no accuracy."
        )
    int8, student, teacher = of(report, "student_int8"), of(report, "student"), of(report, "teacher")
    for column, over in ((int8, student), (shipped(report), teacher)):
        slow = [one for count in threads(report) if (one := pace(column, over, count)) and _not_faster(one)]
        if slow and column is not None and over is not None:
            told = "; ".join(f"{in_words(one)} with {format.threads(one.threads)}" for one in slow)
            found.append(f"{column.role} is not faster than {over.role.lower()} on this machine: {told}.")
    if int8 is not None and student is not None and int8.subject.score and student.subject.score:
        lost = int8.subject.score.percent - student.subject.score.percent
        if lost < -1:
            found.append(
                f"Quantization costs {measure(report)}: {format.points(lost, int8.subject.score.n)} "
                f"against fp32. {budget.remedies(bool(report.config.get('qat')))}"
            )
    ships = shipped(report)
    if ships is not None and ships.subject.score and _width(ships.subject.score) > 10:
        score = ships.subject.score
        found.append(
            f"On {format.counted(score.n, 'test image')} the {measure(report)} is uncertain: "
            f"its 95 % interval is {format.points(_width(score))[1:]} wide."
        )
    elif ships is not None and ships.subject.score and _width(ships.subject.score) == 0:
        score = ships.subject.score  # of an mAP: a share's interval always has a width
        if score.n < FEW:
            found.append(
                f"On {format.counted(score.n, 'test image')} the {measure(report)} is uncertain, whatever "
                "its 95 % interval says: where all is right, a bootstrap has none."
            )
    return list(dict.fromkeys(found))


def _restless(report: Report) -> list[str]:
    if report.bench is None or not report.bench.flags:
        return []
    first = report.bench.flags[0]
    more = "" if len(report.bench.flags) == 1 else " More under Latency."
    return [f"This machine was not quiet while latency was measured: {first.sentence}{more}"]


def _not_faster(one: Pace) -> bool:
    return one.ratio <= 1 if one.verdict is None else one.verdict != "faster"


def _width(score: Score) -> float:
    return score.high - score.low


def missing(report: Report) -> list[str]:
    """What a finished report would hold and this one does not (yet)."""
    wanted = {
        "the student": report.student or report.student_int8,
        "the int8 file": report.student_int8 or report.int8,
        f"{measure(report)} on test images": any(column.subject.score for column in compared(report)),
        "latency": threads(report),
    }
    return [what for what, known in wanted.items() if not known]


def machine(report: Report) -> str | None:
    """The machine in one line, from the environment's entries for processor, cores, system and runtime."""
    known = {key.lower().replace(" ", "_"): value for key, value in report.environment.items()}
    parts = []
    for names, label in (
        (("cpu", "cpu_model", "processor"), ""),
        (("cores_allowed", "cores", "cpu_count"), " core"),
        (("os", "system", "machine"), ""),
        (("onnxruntime", "onnx_runtime"), "ONNX Runtime "),
    ):
        value = next((known[name] for name in names if known.get(name)), None)
        if value:
            many = "s" if label == " core" and value != "1" else ""
            parts.append(f"{label}{value}" if label.endswith("Runtime ") else f"{value}{label}{many}")
    return " · ".join(parts) or None
