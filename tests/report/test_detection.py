"""The report, the model card and the validation page of a detector."""

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.pipeline.api.validate.validate import compare_pairs
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.evaluation.predictions import choose_examples, make_example
from questpress.pipeline.evaluation.results import Network, Validation
from questpress.pipeline.report import networks, summary
from questpress.pipeline.report.run_report import model_card
from questpress.pipeline.report.sections import classes
from questpress.pipeline.report.validation_page import class_table, pairs_table, terminal_table
from questpress.pipeline.runs.results import Report
from questpress.pipeline.runs.scores import ClassScore, Measure, Prediction, Score
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs

from tests.report.test_model_card import manifest, read_metadata
from tests.support import reports
from tests.support.pages import Reader, html, markdown

TASK = load_task("detection")
CELLS = ["RBC", "WBC", "Platelets"]
LABELS = np.array([[[0, 0.1, 0.1, 0.3, 0.3, 900, 0], [1, 0.5, 0.5, 0.9, 0.9, 4000, 0]]] * 20, np.float32)
LOGITS = np.array([[[0.9, 0, 0.1, 0.1, 0.3, 0.3], [0.8, 1, 0.5, 0.5, 0.9, 0.9]]] * 20, np.float32)


def score(percent: float) -> Score:
    return Score(
        metric="AP", percent=percent, low=percent - 3, high=percent + 2.5, n=72,
        details={
            "AP50": Measure(percent=88.5, low=85.1, high=91), "AP small": Measure(percent=31.25),
            "AR100": Measure(percent=70),
        },
        classes=[
            ClassScore(label="RBC", n=72, percent=61), ClassScore(label="WBC", n=70, percent=82.5),
            ClassScore(label="Platelets", n=0, percent=None),
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    full = reports.full()
    assert full.data and full.student and full.student_int8 and full.teacher
    none = {"calibration": None}
    picture = np.asarray(PillowImage.effect_noise((160, 120), 90).convert("RGB"))
    mistake = Prediction("1 RBC", 0.7, 0.4)
    examples = [
        make_example(image, "2 RBC, 1 WBC", own, other, TASK.draw(picture, LABELS[0], LOGITS[0], CELLS), 256)
        for image, own, other in (
            (make_image("right.jpg"), Prediction("2 RBC, 1 WBC", 0.9, 0), None),
            (make_image("wrong.jpg"), mistake, Prediction("2 RBC, 1 WBC", 0.95, 0)),
        )
    ]
    return full.model_copy(
        update={
            "data": full.data.model_copy(update={"task": "detection", "classes": CELLS}),
            "teacher": full.teacher.model_copy(update={"score": score(70), **none}),
            "teachers": [full.teacher.model_copy(update={"score": score(70), **none})],
            "student": full.student.model_copy(update={"score": score(64), **none}),
            "student_int8": full.student_int8.model_copy(update={"score": score(63.5), **none}),
            "examples": examples,
            "confusion": None,
        }
    )


def make_image(name: str) -> Image:
    return Image(name, 0, name, b"")


def test_comparison_has_ap_with_its_interval_and_details(report: Report) -> None:
    tables = networks.comparison_tables(report)
    rows = {row[0]: row[1:] for table in tables for row in table.rows}
    assert rows["AP"] == ["70.0 %", "64.0 %", "63.5 %"]
    assert rows["95 % interval"][2] == "60.5–66.0 %"
    assert rows["AP50"][0] == "88.5 % (85.1–91.0 %)" and rows["AP small"][0] == "31.2 %"
    assert rows["AR100"] == ["70.0 %"] * 3 and "Correct images" not in rows
    *_, figure = summary.key_figures(report)
    assert figure.meaning == "AP of the int8 student" and "on 72 test images" in figure.details
    assert "3 classes of objects" in summary.lead(report)


def test_classes_have_their_ap_and_no_matrix(report: Report) -> None:
    section = classes.section(report)
    table = section.tables[0]
    assert table.note.startswith("AP on the test images.")
    assert {row[0]: row[1:4] for row in table.rows} == {
        "RBC": ["61.0 %"] * 3, "WBC": ["82.5 %"] * 3, "Platelets": ["–"] * 3,
    }  # fmt: skip
    assert section.figures == [None, None]  # neither a matrix nor curves


def test_examples_show_the_worst_first_and_large(report: Report) -> None:
    section = classes.example_section(report)
    [gallery] = section.figures
    assert gallery is not None and gallery.table is not None
    assert [row[0] for row in gallery.table.rows] == ["wrong.jpg", "right.jpg"]
    assert gallery.table.rows[0][2:] == ["1 RBC (70.0 %), wrong", "2 RBC, 1 WBC (95.0 %), correct"]
    assert "True boxes are green" in section.text[0] and "lowest F1" in section.text[0]
    attributes = Reader(html(report)).attributes
    assert ("ul", "class", "gallery large") in attributes
    assert "gallery large" not in html(reports.full())
    assert "AP50" in markdown(report) and "alibration" not in markdown(report).split("## Details")[0]


def test_card_is_that_of_a_detector(report: Report) -> None:
    about = manifest(CELLS, task="detection", decoder={})
    for file in about["files"]:
        file["accuracy"] = TASK.manifest_entry(TASK.score(LOGITS, LABELS, CELLS))
    text = model_card(report, about)
    metadata = read_metadata(text)
    assert metadata["pipeline_tag"] == "object-detection"
    [result] = metadata["model-index"][0]["results"]
    assert result["task"] == {"type": "object-detection"}
    assert [metric["type"] for metric in result["metrics"]] == ["ap"] * 2
    assert "Object detector with 3 classes" in text and "from predict import Detector" in text
    assert "classify.cpp" not in text and "| 100.0 % |" in text and "1. Decode the outputs" in text
    classifier = model_card(reports.full(), manifest())
    assert "Image classifier with" in classifier and "classify.cpp" in classifier
    assert "1. Decode the outputs" not in classifier
    assert read_metadata(classifier)["pipeline_tag"] == "image-classification"


def test_mistakes_are_chosen_by_severity() -> None:
    predictions = [Prediction("", 0.9, severity) for severity in (0, 0.2, 1, 0, 0.5)]
    assert choose_examples(predictions) == [2, 4, 1, 0, 3]


def test_validation_page_compares_ap_and_counts_objects() -> None:
    moved = LOGITS.copy()
    moved[..., 2:] += 0.03
    outputs = [Outputs(LOGITS, LABELS), Outputs(moved, LABELS)]
    pairs = compare_pairs(TASK, ["fp32", "int8"], outputs)
    assert pairs[0].first_alone is None and pairs[0].points > 10 and pairs[0].verdict == "better"
    both = [
        Network(
            name=name, source="", file="", bytes=1, sha256="", image_size=96, classes=CELLS,
            score=TASK.score(own.logits, own.labels, CELLS),
            per_class=TASK.measure_classes(own.logits, own.labels, CELLS)[:2],
        )
        for name, own in zip(("fp32", "int8"), outputs, strict=True)
    ]  # fmt: skip
    validation = Validation(
        title="", command="", data="", source="", split="test", n=20, images="", task="detection",
        per_class={}, networks=both, pairs=pairs,
    )  # fmt: skip
    table = pairs_table(validation)
    assert table.columns == ["", "difference", "p", "p (Holm)", "verdict"] and len(table.rows[0]) == 5
    assert table.note.startswith("Paired bootstrap over images.")
    table = class_table(both[0], both, TASK.counted)
    assert table.columns[:3] == ["class", "objects", "recall"] and table.columns[-1] == "average precision"
    assert table.rows[0][:3] == ["RBC", "20", "100.0 %"] and table.rows[0][-1] == "100.0 %"
    assert terminal_table(validation).rows[0][1] == "100.0 %"
