from questpress.pipeline.report.charts import LEFT, WIDTH
from questpress.pipeline.report.pareto import Candidate, frontier, pareto
from questpress.pipeline.report.pictures import trade
from questpress.pipeline.report.write import html, markdown

from . import reports


def candidate(label: str, cost: float, score: float, size: int | None = None, key: str = "s") -> Candidate:
    told = f"{score} % at {cost} ms"
    return Candidate(label, key, cost, score, told, score - 2, score + 2, size)


def test_area_is_in_proportion_to_the_size_of_the_file() -> None:
    drawn = pareto("t", [candidate("a", 10, 80, 64_000), candidate("b", 1, 70, 4_000)], x_name="ms")
    assert drawn is not None
    large, small = (one.radius for one in drawn.candidates)
    assert abs((large / small) ** 2 - 16) < 0.5


def test_the_faster_is_further_left_and_the_more_accurate_further_up() -> None:
    drawn = pareto("t", [candidate("a", 10, 80), candidate("b", 1, 70), candidate("c", 3, 75)], x_name="ms")
    assert drawn is not None
    a, b, c = drawn.candidates
    assert b.x < c.x < a.x and a.y < c.y < b.y
    assert b.low is not None and b.high is not None and b.high < b.y < b.low


def test_far_apart_times_lie_on_a_logarithmic_axis_which_says_so() -> None:
    drawn = pareto("t", [candidate("a", 16, 80), candidate("b", 1, 70), candidate("c", 4, 75)], x_name="ms")
    assert drawn is not None and drawn.x_name == "ms, logarithmic"
    a, b, c = (one.x for one in drawn.candidates)
    assert abs((a - c) - (c - b)) < 0.2
    near = pareto("t", [candidate("a", 2, 80), candidate("b", 1, 70)], x_name="ms")
    assert near is not None and near.x_name == "ms" and near.x_ticks[0].text == "0"


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    those = [
        candidate("slow, best", 10, 90),
        candidate("fast", 1, 70),
        candidate("beaten by fast", 2, 69),
        candidate("between", 5, 80),
        candidate("as fast as between, worse", 5, 79),
    ]
    assert [those[i].label for i in frontier(those)] == ["fast", "between", "slow, best"]
    twins = [candidate("a", 1, 70), candidate("b", 1, 70)]
    assert frontier(twins) == [0, 1]


def test_names_lie_inside_the_picture_and_not_on_each_other() -> None:
    drawn = pareto(
        "t",
        [candidate("Teacher", 20, 78, 90_000), candidate("fp32", 1.2, 77, 9_000), candidate("int8", 1.1, 77)],
        x_name="ms",
    )
    assert drawn is not None and not drawn.numbered
    assert [one.label for one in drawn.candidates] == ["Teacher", "fp32", "int8"]
    assert all(LEFT <= one.label_x <= WIDTH for one in drawn.candidates)
    fp32, int8 = drawn.candidates[1:]
    assert abs(fp32.label_y - int8.label_y) >= 14 or fp32.anchor != int8.anchor


def test_names_without_room_become_numbers_with_a_list() -> None:
    many = [candidate(f"a run with a long name {i}", 1 + i / 10, 70 + i % 3) for i in range(12)]
    drawn = pareto("t", many, x_name="ms")
    assert drawn is not None and drawn.numbered
    assert [one.label for one in drawn.candidates] == [str(i + 1) for i in range(12)]
    assert drawn.candidates[11].name == "a run with a long name 11"


def test_one_and_nothing_finite_make_a_picture_and_none() -> None:
    one = pareto("t", [candidate("a", 1, 70)], x_name="ms")
    assert one is not None and one.frontier == ""
    assert pareto("t", [candidate("a", float("nan"), 70), candidate("b", 0, 70)], x_name="ms") is None


def test_a_report_shows_teacher_fp32_and_int8_and_says_them_in_words() -> None:
    report = reports.full()
    drawn = trade(report)
    assert drawn is not None
    assert [(one.label, one.key) for one in drawn.candidates] == [
        ("Teacher", "teacher"),
        ("fp32", "student"),
        ("int8", "student_int8"),
    ]
    assert "1 thread" in drawn.x_name
    assert "at 0.684 ms, 2.55 MB" in drawn.description
    assert 'class="chart pareto"' in html(report)
    assert "Accuracy over latency. Teacher: " in markdown(report)


def test_before_the_bench_there_is_no_picture_of_latency() -> None:
    assert trade(reports.teacher_only()) is None
    assert "pareto" not in html(reports.teacher_only()).split("</style>")[1]
