"""A whole job on images whose classes and files have hostile names: they stay text wherever they are
shown.
"""

import csv
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image as PillowImage

from tests.support import little
from tests.support.pages import Reader

CLASSES = [
    "</style><script>alert(1)</script>",
    "x\x1b]0,owned\x07\x9b2J\u202e\u2028\ud800 | `a` [b](http://evil)\n---\n# c",
    "=cmd|'/c calc'!A1",
]
FILE = "\x1b[2J<img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    rows = []
    for label, name in enumerate(CLASSES):
        for number in range(12):
            file = f"{FILE}{label}{number}.png"
            PillowImage.fromarray(little.picture(label, number)).save(root / file)
            rows.append(json.dumps({"file": file, "labels": [name]}))
    (root / "labels.jsonl").write_text("\n".join(rows))
    out = root / "run"
    more = ("--method", "none", "--teacher-epochs", "1", "--epochs", "1", "--until", "validate")
    given = ("--data", root / "labels.jsonl", "--out", out, "--cache", cache)
    done = little.check_success(little.compress(*little.NETWORKS, *little.SMALL, *given, *more))
    (root / "output.txt").write_text(done.output)
    return out


def harmless(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


def test_terminal_output_has_no_control_characters(run: Path) -> None:
    assert harmless((run.parent / "output.txt").read_text())


def test_reports_have_no_control_characters(run: Path) -> None:
    for name in ("report.html", "report.md", "report.json", "artifact/README.md", "config.yaml"):
        assert harmless((run / name).read_text(encoding="utf-8")), name


def test_report_escapes_hostile_names(run: Path) -> None:
    read = Reader((run / "report.html").read_text(encoding="utf-8"))
    assert "script" not in read.tags and read.tags.count("style") == 1
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert CLASSES[0] in "".join(read.words)
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown


def test_card_is_one_document_with_a_head_that_can_be_read(run: Path) -> None:
    text = (run / "artifact" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "onnx"
    assert "<script" not in body and "# c" not in body.splitlines()


def test_shipped_labels_are_escaped(run: Path) -> None:
    labels = json.loads((run / "artifact" / "manifest.json").read_text())["labels"]
    assert CLASSES[0] in labels and all(map(harmless, labels))
    image = next(run.parent.glob("*.png"))
    for more in ([], ["--json"]):
        done = little.compress("predict", run, image, "--threads", "1", *more)
        assert done.exit_code == 0 and harmless(done.output)


def test_lists_for_a_spreadsheet_hold_no_formula_and_no_controls(run: Path) -> None:
    done = little.compress("validate", run)
    assert done.exit_code == 0 and harmless(done.output), done.output
    page = Reader((run / "validation" / "validation.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    with (run / "validation" / "mistakes.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert cells and not [
        cell for cell in cells if cell.startswith(("=", "+", "-", "@")) or not harmless(cell)
    ]
