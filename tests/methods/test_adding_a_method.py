"""The worked example of docs/adding-a-method.md, as another package would bring it."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from questpress.pipeline import methods
from questpress.pipeline.errors import UsageError
from questpress.pipeline.methods.base import Batch, Setup, Shapes

from tests.support import little

PAGE = Path(__file__).parent.parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example on the path, with its entry points as an installer would write them."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (project,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    (tmp_path / "attention.py").write_text(code, encoding="utf-8")
    told = tomllib.loads(project)["project"]
    info = tmp_path / "attention_transfer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attention-transfer\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in told["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("attention", None)


@pytest.mark.usefixtures("installed")
def test_examples_loss_is_its_formulas():
    random = np.random.default_rng(0)
    f_s, f_t = random.standard_normal((2, 3, 4, 4)), random.standard_normal((2, 5, 2, 2))
    found = methods.load("attention")
    shapes = [Shapes({"map": shape}, None, 10) for shape in ((3, 4, 4), (5, 2, 2))]
    method = found(found.parameters_class(beta=7.0), Setup(shapes[0], [shapes[1]], {}))
    losses = method(
        Batch(
            {"map": torch.from_numpy(f_s)},
            [{"map": torch.from_numpy(f_t)}],
            torch.zeros(2, dtype=torch.long),
            0,
        )
    )

    coarse = f_s.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    q_s, q_t = ((f**2).mean(1).reshape(2, -1) for f in (coarse, f_t))
    q_s, q_t = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in (q_s, q_t))
    assert float(losses["attention"]) == pytest.approx(7 * ((q_s - q_t) ** 2).mean(), rel=1e-5)


@pytest.mark.usefixtures("installed")
def test_example_trains_a_student_and_its_weight_is_left_alone(data, cache, tmp_path):
    out = tmp_path / "run"
    result = little.compress(
        *little.NETWORKS, *little.SMALL, *little.SHORT, "--method", "attention",
        "--data", data, "--out", out, "--cache", cache, "--until", "student",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    report = little.report(out)
    assert report["method_parameters"] == {"attention.beta": 1000.0}
    assert all(epoch["losses"]["attention"] > 0 for epoch in report["epochs"] if epoch["stage"] == "student")
    assert report["balance"] == []


def test_method_failing_to_import_is_reported(installed):
    (installed / "attention.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(UsageError, match=r"attention:Attention.*nothing_of_the_kind"):
        methods.load("attention")


def test_object_that_is_no_method_is_refused(installed):
    (installed / "attention.py").write_text("class Attention: name = 'attention'\n")
    with pytest.raises(UsageError, match="is not a method"):
        methods.load("attention")
