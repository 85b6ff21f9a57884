"""Each command that takes an .onnx file refuses a hostile one before a runtime loads it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from questpress.export.runtime import session

from tests.support import hostile_onnx
from tests.support.little import compress, photos, refused
from tests.support.networks import color_classifier, write_little_manifest

SOME = [
    (hostile_onnx.external, "another file"),
    (hostile_onnx.functions_of_functions, "more than 200,000 nodes"),
]


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a runtime has loaded it")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("colors"), dict.fromkeys(("red", "green", "blue"), 2))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return color_classifier(tmp_path / "sound.onnx")


def list_commands(file: Path, sound: Path, colors: Path, out: Path) -> Iterator[list[str | Path]]:
    """Yield every command that takes an .onnx file."""
    yield ["bench", file, "--out", out]
    yield ["bench", sound, file, "--out", out]
    yield ["predict", file, colors]
    yield ["validate", file, "--data", colors, "--out", out]


@pytest.mark.parametrize(("harm", "message"), SOME)
@pytest.mark.usefixtures("no_session")
def test_single_file_is_refused_by_every_command(
    harm: hostile_onnx.Harm, message: str, colors: Path, tmp_path: Path, sound: Path
) -> None:
    model = hostile_onnx.little()
    harm(model)
    file = tmp_path / "hostile.onnx"
    file.write_bytes(model.SerializeToString())
    for arguments in list_commands(file, sound, colors, tmp_path / "out"):
        stderr = refused(compress(*arguments), 2, "hostile.onnx")
        assert message in stderr
    assert not (tmp_path / "out").exists()


def test_artifact_folder_whose_author_means_harm_is_refused_by_every_command(
    colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksums are valid. They show that no file is damaged, not that the author is trusted."""
    monkeypatch.setattr(session, "open_session", lambda *_, **__: pytest.fail("a runtime has loaded it"))
    model = onnx.load(color_classifier(tmp_path / "student.onnx"))
    hostile_onnx.external(model)
    (tmp_path / "student.onnx").write_bytes(model.SerializeToString())
    write_little_manifest(tmp_path)
    for arguments in (
        ["bench", tmp_path],
        ["predict", tmp_path, colors],
        ["validate", tmp_path, "--data", colors],
    ):
        assert "another file" in refused(compress(*arguments), 2)


def test_predict_checks_a_file_whatever_the_options(tmp_path: Path) -> None:
    file = color_classifier(tmp_path / "net.onnx")
    result = compress("predict", file, "--file", "student.onnx", tmp_path / "a.png")
    refused(result, 2, "--file", "requires a run folder")


def test_names_from_a_file_do_not_reach_the_terminal_unescaped(tmp_path: Path, data: Path) -> None:
    file = color_classifier(tmp_path / "net.onnx")
    model = onnx.load(file)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1, 50]), "channels"))
    node = onnx.helper.make_node("Gather", ["input", "channels"], ["x"], name="\x1b[31mred", axis=1)
    model.graph.node.insert(0, node)
    model.graph.node[1].input[0] = "x"
    onnx.save(model, file)
    command = [sys.executable, "-m", "questpress.pipeline", "predict", file, data / "red" / "000.png"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Gather" in result.stderr
    assert "\x1b[31m" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_predictions_are_an_error(tmp_path: Path, data: Path, value: float) -> None:
    file = color_classifier(tmp_path / "net.onnx")
    model = onnx.load(file)
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((3, 3), value, np.float32), "weights")
    )
    onnx.save(model, file)
    for command in (["predict", file, data / "red" / "000.png"], ["validate", file, "--data", data]):
        refused(compress(*command, *(["--out", tmp_path / "v"] * (command[0] == "validate"))), 1,
                       "net.onnx returns logits that are not finite")  # fmt: skip
