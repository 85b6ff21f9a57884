"""The runtime that ships with an artifact: which files, and that they import nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from questpress.export import device, predict_cli, runtime, text
from questpress.export.artifact import PREDICT, RUNTIME, runtime_files, write_runtime

TREES = {name: ast.parse(content, feature_version=(3, 8)) for name, content in runtime_files().items()}
ALLOWED = {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime", RUNTIME}


def test_shipped_files_are_the_modules_of_this_package() -> None:
    files = runtime_files()
    for module in (device, runtime, text, predict_cli):
        path = Path(module.__file__)
        sources = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
        for source in sources:
            folder = "" if module in (text, predict_cli) else f"{path.parent.name}/"
            assert files.pop(f"{RUNTIME}/{folder}{source.name}") == source.read_bytes()
    assert list(files) == [PREDICT, f"{RUNTIME}/__init__.py"]


@pytest.mark.parametrize("name", TREES)
def test_shipped_files_import_only_each_other_and_three_packages(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED
        elif isinstance(node, ast.ImportFrom):
            folder = Path(name).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split(".")).as_posix()
            assert {f"{module}.py", f"{module}/__init__.py"} & TREES.keys()


def test_unchanged_files_are_not_rewritten(tmp_path: Path) -> None:
    write_runtime(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).as_posix() for path in files} == set(runtime_files())
    changed = tmp_path / PREDICT
    changed.write_text("changed")
    write_runtime(tmp_path)
    assert changed.read_bytes() == runtime_files()[PREDICT]
    assert all(path.stat().st_mtime_ns == before for path, before in files.items() if path != changed)


def test_predict_py_exports_the_runtime_and_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    write_runtime(tmp_path)
    code = "import predict; print(*sorted(vars(predict)))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert {*runtime.__all__} <= {*done.stdout.split()}
    before = sorted(tmp_path.rglob("*"))
    subprocess.run([sys.executable, tmp_path / PREDICT, "--help"], capture_output=True, check=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", TREES)
def test_shipped_files_are_of_python_3_8(name: str) -> None:
    later = {"has_transparency_data", "removeprefix", "removesuffix", "is_relative_to", "strict"}
    used = {getattr(node, "attr", None) or getattr(node, "arg", None) for node in ast.walk(TREES[name])}
    assert not later & used
    unions = [
        node
        for call in ast.walk(TREES[name])
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance"
        for node in ast.walk(call.args[1])
        if isinstance(node, ast.BinOp)
    ]
    assert not unions
