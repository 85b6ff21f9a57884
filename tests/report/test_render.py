"""Rendered reports: complete, safe with hostile names, and within the limits of a pull request."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from questpress.export.results import FloatNode
from questpress.pipeline.errors import JobError
from questpress.pipeline.report import run_report
from questpress.pipeline.report.run_report import write_report
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.record import read_checked
from questpress.pipeline.runs.results import Epoch, Report, ShownWord

from tests.support import int8_reports, reports
from tests.support.pages import HOSTILE, Reader, html, markdown, with_everything

PARTIAL = {
    "nothing yet": reports.bare(),
    "teacher only": reports.teacher_only(),
    "no teacher": reports.without("teacher", "teachers"),
    "no int8": reports.without("student_int8", "examples", "confusion"),
    "int8 of two targets": int8_reports.with_int8(),
    "int8 without test images": reports.without("student", "student_int8", "data").model_copy(
        update={"int8": int8_reports.with_int8().int8, "recovery": int8_reports.with_recovery().recovery}
    ),
    "recovery alone": reports.bare().model_copy(update={"recovery": int8_reports.with_recovery().recovery}),
    "no int8 file": int8_reports.without_int8_file(),
    "no fp32": reports.without("student"),
    "no data": reports.without("data"),
    "no epochs": reports.without("epochs", "words"),
    "no confusion": reports.without("confusion", "examples", "environment", "config", "stages"),
}


def without_data_addresses(page: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:", page)


def test_html_and_markdown_have_the_figures_of_the_run(tmp_path: Path) -> None:
    report = reports.full()
    write_report(report, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert report.student_int8 and report.student_int8.score
    figures = [
        "mobilenetv2_100 distilled from resnet34", "33.4×", "18.2×",
        f"{report.student_int8.score.percent:.1f} %",
        "0.684 ms", "12.4 ms", "2.55 MB", "85.1 MB", "704", "431.7", "0.01432", "AMD EPYC 9555", "17.9–18.5×",
        report.command, report.warnings[0], "41ae" * 16, "train/hat/0213.jpg", "s8 per channel", "Apache-2.0",
        "21 min 01 s", "calibration.images",
    ]  # fmt: skip
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    shown = " ".join(" ".join(page.words).split())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for figure in figures:
        assert figure in shown, figure
        assert figure in text, figure


def test_json_round_trip_preserves_the_report() -> None:
    for report in (reports.full(), *PARTIAL.values()):
        assert Report.model_validate_json(report.model_dump_json()) == report


def test_loss_that_is_not_finite_survives_json_and_is_shown(tmp_path: Path) -> None:
    lost = Epoch(stage="student", epoch=1, epochs=3, images_per_second=9, learning_rate=0.1,
                 losses={"ce": float("nan"), "loss": float("inf")})  # fmt: skip
    report = reports.full().model_copy(update={"epochs": [lost]})
    write_report(report, tmp_path)
    back = Report.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert back.epochs[0].losses["ce"] != back.epochs[0].losses["ce"]
    assert back.epochs[0].losses["loss"] == float("inf")
    assert "ce not finite" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("state", PARTIAL)
def test_partial_report_is_complete_html(state: str, tmp_path: Path) -> None:
    write_report(PARTIAL[state], tmp_path)
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    sections = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert {f"#{id}" for id in page.ids()} == set(sections), "every link of the page leads somewhere"
    assert "None" not in " ".join(page.words)
    assert "None" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_page_without_test_score_shows_the_validation_score() -> None:
    report = reports.teacher_only()
    assert "test accuracy not measured yet" in html(report)
    assert "teacher 91.5 % (88.1–94.0 %) on validation images" in markdown(report)


def test_rendering_is_deterministic() -> None:
    assert html(reports.full()) == html(reports.full())
    assert markdown(reports.full()) == markdown(reports.full())


def test_page_has_no_external_references() -> None:
    page = without_data_addresses(html(reports.full()))
    read = Reader(page)
    assert "script" not in read.tags and "iframe" not in read.tags
    for tag, name, value in read.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"href", "src", "srcset", "data", "action", "poster"}:
            assert value is not None and value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\(|@import|http:|https:", page)
    assert (
        "meta",
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    ) in read.attributes


def test_ids_are_unique_and_figures_have_descriptions() -> None:
    read = Reader(html(reports.full()))
    assert len(read.ids()) == len(set(read.ids()))
    pictures = [attribute for attribute in read.attributes if attribute == ("svg", "role", "img")]
    # Accuracy over latency is there for a wide window and for a phone.
    assert len(pictures) == 2 + 6 + 4
    described = [value for tag, name, value in read.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(described) == len(pictures) and all(described)
    images = [value for tag, name, value in read.attributes if tag == "img" and name == "alt"]
    assert len(images) == 10 and all(images)


def hostile_report() -> Report:
    report = reports.full(HOSTILE)
    assert report.data is not None
    data = report.data.model_copy(
        update={"name": HOSTILE[0], "skipped": [(name, name) for name in HOSTILE], "duplicates": [HOSTILE]}
    )
    odd = [
        report.epochs[0].model_copy(update={"stage": name, "losses": {name: 1.0}, "metrics": {name: 1.0}})
        for name in HOSTILE
    ]
    int8 = [
        search.model_copy(
            update={
                "target": name,
                "file": name,
                "not_timed": name,
                "slow": name,
                "tried": [search.tried[0].model_copy(update={"name": name, "calibration": name})],
                "float_parts": [FloatNode(name=name, op_type=name, why=name)],
                "worst": [(name, 1.0)],
            }
        )
        for name in HOSTILE
        for search in int8_reports.with_int8().int8[:1]
    ]
    return report.model_copy(
        update={
            "data": data,
            "int8": int8,
            "title": HOSTILE[0],
            "method": HOSTILE[1],
            "command": "\n".join(HOSTILE) + "\n```\n# out",
            "warnings": HOSTILE,
            "epochs": odd,
            "environment": {name: name for name in HOSTILE},
            "config": {name: {name: [name]} for name in HOSTILE},
        }
    )


def test_hostile_names_are_text_in_html() -> None:
    read = Reader(html(hostile_report()))
    assert "script" not in read.tags
    assert read.tags.count("style") == 1
    assert read.tags.count("img") == 10
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for _, name, value in read.attributes if name == "src" and value)
    shown = "".join(read.words)
    assert HOSTILE[0] in shown and "{{ 7 * 7 }}" in shown


def test_hostile_names_are_text_in_markdown() -> None:
    text = markdown(hostile_report())
    outside, inside = [], False
    for line in text.splitlines():
        if line.startswith("````"):
            inside = not inside
        elif not inside:
            outside.append(line)
    assert not inside
    rest = "\n".join(outside)
    assert "<script" not in rest and "<img" not in rest and "<!--" not in rest
    assert not re.search(r"(?<!\\)\[", rest), "no link"
    assert sum(line.startswith("# ") for line in outside) == 1, "no heading but the title"
    for table in rest.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(bars) <= 1, "a bar in a name does not make a column"


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    report = reports.full()
    assert report.data is not None
    report.data.skipped.append(("gr\udcfcn.jpg", "no image"))
    report.command = "compress --data gr\udcfcn"
    write_report(report, tmp_path)
    for name in ("report.html", "report.md", "report.json"):
        assert "gr\\xfcn" in (tmp_path / name).read_text(encoding="utf-8").replace("\\\\", "\\")


def test_image_that_is_not_a_png_is_left_out() -> None:
    report = reports.full()
    bad = report.examples[0].model_copy(update={"png": '"><script>alert(1)</script>'})
    read = Reader(html(report.model_copy(update={"examples": [bad]})))
    assert "img" not in read.tags and "script" not in read.tags


def test_many_classes_have_confused_pairs_instead_of_a_matrix() -> None:
    many = html(reports.full([f"class {i}" for i in range(60)]))
    assert 'class="confusion"' not in many and "Most confused" in many
    assert 'class="confusion"' in html(reports.full())


def test_page_of_many_classes_shows_the_weakest_and_links_all(tmp_path: Path) -> None:
    names = [f"=class {i:04d}" for i in range(2000)]
    report = reports.full(names)
    assert report.data is not None and report.confusion is not None and report.student_int8 is not None
    write_report(report, tmp_path)
    assert read_checked(tmp_path / "report.json")["confusion"] == [[*count] for count in report.confusion]
    with (tmp_path / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == [f"'{name}" for name in names]
    assert [int(row["train"]) for row in classes] == list(report.data.per_class["train"].values())
    assert report.student_int8.score is not None
    percents = [score.percent for score in report.student_int8.score.classes]
    assert [float(row["Student int8"]) for row in classes] == percents
    with (tmp_path / "confusion.csv").open(newline="") as file:
        pairs = [(row["true class"], row["prediction"], int(row["images"])) for row in csv.DictReader(file)]
    mistakes = [(f"'{names[i]}", f"'{names[k]}", n) for i, k, n in report.confusion if i != k]
    assert sorted(pairs) == sorted(mistakes) and pairs[0][2] == max(n for _, _, n in mistakes)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 300_000 and 'href="classes.csv"' in page and 'href="confusion.csv"' in page
    weakest = names[percents.index(min(percents))]
    assert f'<th scope="row">{weakest}</th>' in page
    assert "(classes.csv)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_confusion_cells_hold_the_counts() -> None:
    report = reports.full()
    assert report.confusion is not None
    page = html(report)
    for label, predicted, n in report.confusion:
        percent = round(100 * n / sum(own for other, _, own in report.confusion if other == label))
        kind = "hit" if label == predicted else "miss"
        assert f'<td class="{kind}" style="--percent:{percent}%">{n}</td>' in page


def test_report_is_written_during_a_training_but_not_after_each_short_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.open(fresh=False)
    options = {"teacher": ["a"], "student": "b", "method": "none", "settings": {}, "image_size": 32}
    folder.begin({}, {**options, "student_size": None}, "compress")
    live, page, clock = run_report.LiveReport(folder), tmp_path / "report.html", iter(range(100, 200))
    monkeypatch.setattr(run_report.time, "monotonic", lambda: next(clock) / 10)
    for n in (1, 2):
        folder.log_epoch(reports.epochs("teacher", 2)[n - 1])
        live()
        assert len(json.loads((tmp_path / "report.json").read_text())["epochs"]) == 1
    assert "Training</h2>" in page.read_text(encoding="utf-8")
    assert '<details class="section"><summary><h2>Training' not in page.read_text(encoding="utf-8")
    live.next = 0.0
    live()
    assert len(json.loads((tmp_path / "report.json").read_text())["epochs"]) == 2


def test_finished_report_shows_comparison_images_and_classes_and_folds_the_rest() -> None:
    page = html(with_everything())
    assert re.findall("^<h2>(.*?)</h2>", page, re.M) == ["Comparison", "Test images", "Classes"]
    assert re.findall(r'<details class="section"><summary><h2>(.*?)</h2>', page) == [
        "Latency", "Int8 quantization", "Training", "Visual vocabulary", "Details",
    ]  # fmt: skip
    assert page.index(">Comparison</caption>") < page.index("<details")


def test_failed_write_is_an_error_and_keeps_the_old_report(tmp_path: Path) -> None:
    write_report(reports.bare(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "kept").touch()
    with pytest.raises(JobError, match=r"Could not write .*report\.html"):
        write_report(reports.bare(), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_markdown_of_a_large_run_fits_a_pull_request() -> None:
    report = reports.full([f"class {i}" for i in range(1000)])
    report = report.model_copy(
        update={"epochs": reports.epochs("teacher", 300) + reports.epochs("student", 600)}
    )
    assert report.data is not None
    report.data.skipped = [(f"train/{i}.jpg", "truncated") for i in range(3000)]
    text = markdown(report)
    assert len(text) < 65_536
    assert "The first 40 of 900; all are in report.json." in text


def test_markdown_with_long_names_fits_a_pull_request() -> None:
    for length in (100, 400, 3000):
        names = [f"{i} {'long name ' * (length // 10)}" for i in range(20)]
        report = reports.full(names)
        assert report.data is not None
        report.data.skipped = [(f"{names[0]}/{i}.jpg", "truncated") for i in range(3000)]
        report.data.duplicates = [names] * 50
        text = markdown(report)
        assert len(text) <= 65_000
        assert text.count("<details>") == text.count("</details>")
        assert text.startswith("# mobilenetv2_100 distilled from resnet34")


def test_page_with_images_stays_small() -> None:
    """Pictures of noise, which no PNG makes small."""

    def noise(side: int) -> str:
        buffer = io.BytesIO()
        Image.effect_noise((side, side), 80).convert("RGB").save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    report = reports.full()
    examples = [e.model_copy(update={"png": noise(128)}) for e in (report.examples * 2)[:12]]
    shown = [ShownWord(rank=i + 1, share=1.0, patches=[noise(48)] * 6) for i in range(9)]
    words = [report.words[0].model_copy(update={"shown": shown})]
    assert len(html(report.model_copy(update={"examples": examples, "words": words}))) < 1_500_000
