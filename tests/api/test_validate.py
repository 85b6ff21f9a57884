"""`compress validate`: metrics recomputed by hand, labels matched by name, messages about unsuitable data."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.export.runtime import Classifier, decode_image
from questpress.export.text import escape_controls
from questpress.pipeline.api.validate.validate import compare_pairs, validate
from questpress.pipeline.evaluation.comparison import mcnemar
from questpress.pipeline.evaluation.results import Validation
from questpress.pipeline.report.validation_page import render_validation
from questpress.pipeline.runs.files import escape_cell
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.tasks import load_task
from questpress.pipeline.tasks.base import Outputs
from safetensors.numpy import load_file

from tests.support import hostile_onnx, little

WIDE = {"blue": 4, "green": 5, "red": 6}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that no run has seen, as class folders without roles."""
    return little.photos(tmp_path_factory.mktemp("more") / "more", WIDE, first=77)


@pytest.fixture(scope="module")
def result(finished: Path, more: Path, tmp_path_factory: pytest.TempPathFactory) -> Validation:
    return validate(finished, data=more, out=tmp_path_factory.mktemp("out"), quiet=True)


def logits(classifier: Classifier, files: list[Path]) -> np.ndarray:
    """Return the logits of the files, predicted one image at a time."""
    rows = []
    for file in files:
        [prediction] = classifier.predict([decode_image(file)], top=len(classifier.labels))
        rows.append([np.log(dict(prediction.top)[label]) for label in classifier.labels])
    return np.array(rows)


def wilson(k: int, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, k / n
    center, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return 100 * (center - half) / (1 + z * z / n), 100 * (center + half) / (1 + z * z / n)


def test_metrics_equal_those_computed_image_by_image(result: Validation, finished: Path, more: Path) -> None:
    files = sorted(more.rglob("*.png"))
    assert result.n == len(files) == 15 and result.split == "all" and result.per_class == WIDE
    labels = np.array([little.CLASSES.index(file.parent.name) for file in files])
    predictions = {}
    for net in result.networks:
        classifier = Classifier.load(finished / ("bench" if net.role == "teacher" else "artifact") / net.file)
        outputs = logits(classifier, files)
        predictions[net.name], predicted = outputs.argmax(1), outputs.argmax(1)
        correct = int((predicted == labels).sum())
        assert net.score is not None and net.score.correct == correct and net.mistakes == 15 - correct
        if 0 < correct < 15:
            assert (net.score.low, net.score.high) == pytest.approx(wilson(correct, 15))
        nll = -np.mean([outputs[i, label] for i, label in enumerate(labels)])
        assert net.calibration is not None and net.calibration.nll == pytest.approx(nll, abs=1e-4)
        table = np.zeros((3, 3), dtype=int)
        np.add.at(table, (labels, predicted), 1)
        assert net.confusion == [(i, k, table[i, k]) for i, k in np.argwhere(table).tolist()]
        for number, row in enumerate(net.per_class):
            assert (row.n, row.predicted, row.correct) == (
                table[number].sum(), table[:, number].sum(), table[number, number],
            )  # fmt: skip
            if row.recall is not None:
                assert row.recall.percent == pytest.approx(100 * table[number, number] / table[number].sum())
    assert [net.name for net in result.networks] == ["int8", "fp32", "teacher"]
    same = int((predictions["int8"] == predictions["teacher"]).sum())
    assert result.first.agreement is not None and result.first.agreement.correct == same
    assert result.first.teacher == "teacher" and result.networks[-1].teacher is None
    pair = next(pair for pair in result.pairs if {pair.first, pair.second} == {"int8", "teacher"})
    right = {name: predicted == labels for name, predicted in predictions.items()}
    assert pair.first_alone == int((right["int8"] & ~right["teacher"]).sum())
    assert pair.p == pytest.approx(mcnemar(pair.first_alone, pair.second_alone))


def test_validation_defaults_to_the_runs_test_images(finished: Path, tmp_path: Path) -> None:
    result = little.compress("validate", finished, "--out", tmp_path, "--json", "--teacher", "none")
    assert result.exit_code == 0, result.output
    validation, report = Validation.model_validate_json(result.stdout), little.report(finished)
    assert validation.split == "test" and validation.n == report["data"]["test"] and not validation.warnings
    for net, key in zip(validation.networks, ("student_int8", "student"), strict=True):
        assert net.score is not None
        assert net.score.correct == report[key]["score"]["correct"]
        assert net.agreement is None
    assert not (tmp_path / "differences.csv").exists() and not any(e.png for e in validation.examples)
    with_teacher = validate(finished, out=tmp_path, quiet=True)
    teacher, agreement = with_teacher.networks[-1].score, with_teacher.first.agreement
    assert teacher is not None and teacher.correct == report["teacher"]["score"]["correct"]
    assert agreement is not None and agreement.correct == report["student_int8"]["agreement"]["correct"]


def test_validate_stage_stores_predictions_of_each_file(finished: Path) -> None:
    kept, report = load_file(finished / "test_predictions.safetensors"), little.report(finished)
    for key in ("student", "student_int8"):
        right = int((kept[key] == kept["labels"]).sum())
        assert right == report[key]["score"]["correct"] and len(kept[key]) == report["data"]["test"]


def test_verdict_needs_a_corrected_p_below_five_percent() -> None:
    right = np.arange(40) < 30
    few, many = right.copy(), right.copy()
    few[:3], many[:14] = False, False
    outputs = [
        Outputs(np.eye(2)[correct.astype(int)], np.ones(40, dtype=int)) for correct in (right, few, many)
    ]
    one, two, three = compare_pairs(load_task("classification"), ["a", "b", "c"], outputs)
    assert (one.verdict, two.verdict, three.verdict) == ("no difference", "better", "better")
    assert (one.first_alone, one.second_alone, one.points) == (3, 0, 7.5)
    assert one.p_holm >= one.p == pytest.approx(0.25)


def test_mistakes_are_sorted_by_probability(result: Validation, finished: Path, more: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((Path(str(result.folder)) / "mistakes.csv").read_text())))
    models = [row["model"] for row in rows]
    assert models == sorted(models, key=["int8", "fp32", "teacher"].index)
    mistakes = [row for row in rows if row["model"] == "int8"]
    assert len(mistakes) == result.first.mistakes and all(row["correct"] == "no" for row in mistakes)
    probabilities = [float(row["probability"]) for row in mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    classifier = Classifier.load(finished)
    for row in mistakes:
        [prediction] = classifier.predict([more / row["file"]])
        assert (prediction.label, row["label"]) == (row["prediction"], Path(row["file"]).parent.name)
        assert float(row["probability"]) == pytest.approx(prediction.probability, abs=1e-5)
    differ = list(csv.DictReader(io.StringIO((Path(str(result.folder)) / "differences.csv").read_text())))
    assert all(row["prediction"] != row["teacher_prediction"] for row in differ)
    agreement = result.first.agreement
    assert agreement is not None
    assert sum(row["model"] == "int8" for row in differ) == agreement.n - agreement.correct
    assert [example.name for example in result.examples] == [row["file"] for row in mistakes]


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\tx", "  =x"])
def test_no_cell_is_a_formula(cell: str) -> None:
    assert escape_cell(cell) == escape_controls(f"'{cell}") and escape_cell("dress-1") == "dress-1"
    assert escape_cell(f"a;{cell};b") == escape_controls(f"a;'{cell};b")


def test_labels_are_matched_by_name_in_any_order(finished: Path, more: Path, tmp_path: Path) -> None:
    # Numbered backwards: a table's classes are sorted by name, and so are those of folders.
    lines = [f"{file.relative_to(more)},{file.parent.name}" for file in sorted(more.rglob("*.png"))]
    (more / "labels.csv").write_text(
        "file,label\n" + "\n".join(line for line in lines if "green" not in line)
    )
    some = validate(finished, data=more / "labels.csv", out=tmp_path, teacher="none", quiet=True)
    (more / "labels.csv").unlink()
    assert some.per_class == {"blue": 4, "red": 6} and some.first.confusion is not None
    assert {label for label, _, _ in some.first.confusion} == {0, 2}
    assert all(measure.recall is None for measure in some.first.per_class if measure.label == "green")
    every = validate(finished, data=more, out=tmp_path, teacher="none", quiet=True)
    assert every.first.confusion is not None
    assert some.first.confusion == [count for count in every.first.confusion if count[0] != 1]


def test_unknown_class_is_refused_or_ignored(finished: Path, more: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(more, tmp_path / "other"))
    little.photos(other, {"Reds": 3, "violet": 2})
    out = ("--out", tmp_path / "out", "--teacher", "none")
    result = little.compress("validate", finished, "--data", other, *out)
    message = little.refused(result, 2, "'Reds', 'violet'", "--ignore-unknown")
    assert "'Reds' may be its 'red'" in message
    result = little.compress("validate", finished, "--data", other, *out, "--ignore-unknown", "--json")
    validation = Validation.model_validate_json(result.stdout)
    assert validation.n == 15 and "5 images are left out" in validation.warnings[0]


def test_test_split_is_used_when_splits_are_given(finished: Path, tmp_path: Path) -> None:
    data = little.photos(tmp_path / "data", {"test/red": 3, "test/blue": 2, "train/red": 4})
    out = {"out": tmp_path / "out", "teacher": "none", "quiet": True}
    assert validate(finished, data=data, **out).per_class == {"blue": 2, "red": 3}
    validation = validate(finished, data=data, split="all", **out)
    assert validation.n == 9 and validation.split == "all"
    message = little.refused(
        little.compress("validate", finished, "--data", data, "--split", "val", "--out", tmp_path / "out"), 2
    )
    assert "no val images but train and test" in message


def test_training_images_are_recognized_in_other_folders(
    finished: Path, data: Path, more: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(more, tmp_path / "other"))  # 5 green ones, none of the run's
    for number, file in enumerate(sorted((data / "green").iterdir())):
        if number % 2:
            shutil.copy(file, other / "green" / f"again-{file.name}")
        else:
            PillowImage.open(file).save(other / "green" / f"again-{number}.bmp")
    trained = little.report(finished)["data"]["per_class"]["train"]["green"]
    out = {"out": tmp_path / "out", "teacher": "none", "quiet": True}
    assert validate(finished, data=other, **out).warnings == [
        f"colors was trained on {trained} of 35 images or on their copies, so the results are too good."
    ]
    assert validate(finished, data=more, **out).warnings == []


def test_training_images_of_the_run_are_reported(finished: Path, data: Path, tmp_path: Path) -> None:
    validation = validate(finished, data=data, out=tmp_path, teacher="none", quiet=True)
    assert validation.n == 60 and "was trained on 48 of them" in validation.warnings[0]
    train = validate(finished, split="train", out=tmp_path, teacher="none", quiet=True)
    assert train.n == 48 and "were trained on these images" in train.warnings[0]


def test_single_file_is_validated_with_its_own_labels(finished: Path, more: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(finished / "artifact" / "student.onnx", tmp_path / "alone.onnx"))
    teacher = finished / "bench" / "teacher.onnx"
    validation = validate([file, finished], data=more, teacher=teacher, out=tmp_path / "out", quiet=True)
    assert [net.name for net in validation.networks] == ["alone", "colors int8", "colors fp32", "teacher"]
    assert validation.networks[0].score == validation.networks[2].score
    pair = next(pair for pair in validation.pairs if (pair.first, pair.second) == ("alone", "colors fp32"))
    assert (pair.first_alone, pair.second_alone, pair.p) == (0, 0, 1.0)
    assert len(validation.pairs) == 6 and all(net.teacher == "teacher" for net in validation.networks[:3])
    little.refused(little.compress("validate", file), 2, "--data is missing")
    result = validate(file, data=more, out=tmp_path / "out", quiet=True)
    assert "not compared with a teacher" in result.notes[0]
    assert not (tmp_path / "out" / "differences.csv").exists()


def test_hostile_teacher_of_a_run_is_not_opened(
    finished: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    model = hostile_onnx.little()
    hostile_onnx.external(model)
    (run / "bench" / "teacher.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(RunFolder, "check_output", lambda *_: None)  # its author has set the checksums
    validation = validate(run, data=more, out=tmp_path / "out", quiet=True)
    assert "another file" in validation.notes[0] and "not compared with it" in validation.notes[0]


def test_too_many_broken_images_stop_it_and_few_are_listed(
    finished: Path, more: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(more, tmp_path / "other"))
    (other / "red" / "broken.png").write_bytes(b"\x89PNG not really")
    (other / "red" / "empty.png").write_bytes(b"")
    arguments = ("validate", finished, "--data", other, "--teacher", "none", "--out", tmp_path / "out")
    line = little.refused(little.compress(*arguments), 1, "2 of 17 images are unreadable", "red/broken.png")
    assert "red/empty.png (the file is empty)" in line
    assert not (tmp_path / "out").exists()


def test_one_broken_image_of_many_is_counted_and_listed(finished: Path, tmp_path: Path) -> None:
    data = little.photos(tmp_path / "data", {"red": 120, "blue": 1})
    (data / "red" / "broken.png").write_bytes(b"\x89PNG not really")
    validation = validate(finished, data=data, teacher="none", out=tmp_path / "out", quiet=True)
    assert validation.n == 121 and validation.skipped[0][0] == "red/broken.png"
    assert "1 file was skipped; the report has the list." in validation.warnings


def test_missing_or_changed_data_is_refused(a_run: Path, tmp_path: Path) -> None:
    config = (a_run / "config.yaml").read_text()
    data = str(json.loads((a_run / "report.json").read_text())["config"]["data"])
    (a_run / "config.yaml").write_text(config.replace(data, str(tmp_path / "gone")))
    little.refused(little.compress("validate", a_run), 2, "cannot be read", "--data")
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    PillowImage.fromarray(little.picture(0, 12345)).save(changed / "blue" / "000.png")
    (a_run / "config.yaml").write_text(config.replace(data, str(changed)))
    little.refused(little.compress("validate", a_run), 2, "has changed since", "--data")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere does not exist"]),
        (["{run}", "--file", "student.int4.onnx"], ["--file student.int4.onnx is not in"]),
        (["{run}", "--teacher", "missing.onnx"], ["must be an .onnx file or a run folder"]),
        (["{run}/config.yaml"], ["is not an ONNX file"]),
        (["{run}", "--out", "{run}/config.yaml"], ["cannot be written: Not a directory"]),
    ],
)
def test_invalid_validation_arguments_are_refused(
    finished: Path, arguments: list[str], words: list[str]
) -> None:
    filled = [argument.format(run=finished) for argument in arguments]
    little.refused(little.compress("validate", *filled), 2, *words)


def test_pages_escape_names(result: Validation) -> None:
    name = "<script>alert(1)</script>"
    hostile = result.model_copy(deep=True)
    hostile.first.classes[0] = hostile.first.per_class[0].label = hostile.title = name
    hostile.skipped = [(name, name)]
    texts = render_validation(hostile)
    assert "<script" not in texts["validation.html"] and "<script" not in texts["validation.md"]
    for words in ("Pairwise tests", "Results by class, int8", "Calibration", "mistakes.csv"):
        assert words in texts["validation.html"] and words in texts["validation.md"], words


def test_terminal_shows_a_row_for_each_file(finished: Path, more: Path, tmp_path: Path) -> None:
    result = little.compress("validate", finished, "--data", more, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0 and not result.stderr
    for words in ("int8", "fp32", "teacher", "95 % interval", "int8 vs. fp32", "validation.html"):
        assert words in result.stdout, words
