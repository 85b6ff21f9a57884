import ast
from pathlib import Path

from questpress.export import predict_cli, runtime, text
from questpress.export.artifact import predict_py, write_predict
from questpress.export.device import bench, machine, self_test


def names(source: str) -> list[str]:
    """What a module defines at its top."""
    return [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_predict_py_is_the_runtime_and_the_command() -> None:
    modules = (runtime, text, self_test, machine, bench, predict_cli)
    ours = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    made = names(predict_py())
    assert made == [name for source in ours for name in names(source)]
    assert len(made) == len(set(made))


def test_predict_py_contains_the_runtime_verbatim() -> None:
    before, after = Path(runtime.__file__).read_text(encoding="utf-8").split("import hashlib\n", 1)
    assert after.rstrip() in predict_py()
    assert before.split("from __future__")[0] in predict_py()


def test_predict_py_does_not_import_the_package() -> None:
    found = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(predict_py()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert "questpress" not in found and "" not in found
    assert not [n for n in ast.walk(ast.parse(predict_py())) if isinstance(n, ast.ImportFrom) and n.level]


def test_unchanged_predict_py_is_not_rewritten(tmp_path: Path) -> None:
    path = write_predict(tmp_path)
    before = path.stat().st_mtime_ns
    assert write_predict(tmp_path).stat().st_mtime_ns == before
    path.write_text("changed")
    write_predict(tmp_path)
    assert path.read_text(encoding="utf-8") == predict_py()
    assert [file.name for file in tmp_path.iterdir()] == ["predict.py"]


def test_predict_py_is_of_python_3_8() -> None:
    tree = ast.parse(predict_py(), feature_version=(3, 8))
    later = {"has_transparency_data", "removeprefix", "removesuffix", "is_relative_to", "strict"}
    used = {getattr(node, "attr", None) or getattr(node, "arg", None) for node in ast.walk(tree)}
    assert not later & used
    unions = [
        node
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance"
        for node in ast.walk(call.args[1])
        if isinstance(node, ast.BinOp)
    ]
    assert not unions
