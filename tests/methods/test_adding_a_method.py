"""The example of docs/adding-a-method.md as a package with an entry point."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np  # noqa: F401  # used by the page
import pytest
import torch  # noqa: F401
from questpress.pipeline import methods
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods.base import Batch, Setup, Shapes  # noqa: F401  # used by the page

from tests.support import little

PAGE = Path(__file__).parent.parent.parent / "docs" / "adding-a-method.md"


def read_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example on the path, with its entry points as an installer would write them."""
    code, _ = read_blocks("python")
    (project,) = read_blocks("toml")
    (tmp_path / "attention.py").write_text(code, encoding="utf-8")
    entry_points = tomllib.loads(project)["project"]["entry-points"]
    info = tmp_path / "attention_transfer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attention-transfer\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("attention", None)


@pytest.mark.usefixtures("installed")
def test_example_equals_its_formula_in_numpy():
    attention = methods.load("attention")
    names = {"Attention": attention, "Parameters": attention.parameters_class}
    exec(read_blocks("python")[1], globals() | names)


@pytest.mark.usefixtures("installed")
def test_example_trains_a_student_without_being_rescaled(data, cache, tmp_path):
    out = tmp_path / "run"
    little.check_success(little.compress(
        *little.NETWORKS, *little.SMALL, *little.SHORT, "--method", "attention",
        "--data", data, "--out", out, "--cache", cache, "--until", "student",
    ))  # fmt: skip
    report = little.report(out)
    assert report["method_parameters"] == {"attention.beta": 1000.0}
    assert all(epoch["losses"]["attention"] > 0 for epoch in report["epochs"] if epoch["stage"] == "student")
    assert report["balance"] == []


def test_entry_point_that_cannot_be_imported_is_reported(installed):
    (installed / "attention.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(UsageError, match=r"attention:Attention.*nothing_of_the_kind"):
        methods.load("attention")


def test_entry_point_of_another_kind_is_refused(installed):
    (installed / "attention.py").write_text("class Attention: name = 'attention'\n")
    with pytest.raises(UsageError, match="is not a method"):
        methods.load("attention")
