"""The sources contain no function that runs code while it reads a file, and no fallback to one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import questpress.export
import questpress.models
import questpress.pipeline

ROOMS = (questpress.export, questpress.models, questpress.pipeline)
SOURCES = sorted(file for room in ROOMS for place in room.__path__ for file in Path(place).rglob("*.py"))

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.full_load"),
    *("yaml.unsafe_load", "pickle.load", "pickle.loads", "joblib.load", "marshal.loads"),
    *("shelve.open", "dill.loads"),
    *("shutil.unpack_archive", "onnx.load_external_data_for_model", "torch.jit.load", "torch.hub.load"),
}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call in a source with its dotted name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def argument(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def test_sources_are_found() -> None:
    assert len(SOURCES) > 100


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_no_reader_can_run_code(room: object) -> None:
    of_room = [file for file in SOURCES if str(file).startswith(tuple(room.__path__))]  # type: ignore[attr-defined]
    for file in of_room:
        for name, call in calls(file):
            where = f"{file}:{call.lineno} {name}"
            assert name not in FORBIDDEN, where
            if name == "torch.load":
                assert argument(call, "weights_only") is True, where
            if name == "np.load":
                assert argument(call, "allow_pickle") in (None, False), where
            if name.startswith("subprocess."):
                assert argument(call, "shell") in (None, False), where
            assert not name.endswith((".extract", ".extractall")), where
