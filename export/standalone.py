"""predict.py, which lies in every artifact folder: the runtime and the command in one file.

It is `runtime.py` as it is, so that it answers to the bit as the files were validated, and behind it
`plain_text.py` and `command.py` without their imports of ours. It needs numpy, Pillow and onnxruntime.
"""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

from .files import write_whole

PREDICT = "predict.py"

_FUTURE = "from __future__ import annotations\n"

_HEAD = "# Of a questpress artifact: python predict.py photo.jpg, or from predict import Classifier.\n"

_NEEDS = """
if __name__ == "__main__":
    import importlib.util
    import sys

    lacking = {"numpy": "numpy", "PIL": "pillow", "onnxruntime": "onnxruntime"}
    lacking = {name: package for name, package in lacking.items() if not importlib.util.find_spec(name)}
    if lacking:
        needed = " ".join(lacking.values())
        sys.exit(f"Error: not installed here: {', '.join(lacking.values())}; try: pip install {needed}")
"""

_END = """

if __name__ == "__main__":
    run()
"""


def predict_py() -> str:
    """The text of predict.py; the same questpress gives the same bytes."""
    before, after = _read("runtime.py").split(_FUTURE, 1)
    line = "# " + "-" * 105
    command = f"{_without_ours('plain_text.py')}\n\n{_without_ours('command.py')}"
    return f"{_HEAD}{before}{_FUTURE}{_NEEDS}{after}\n\n{line}\n# The command\n\n{command}{_END}"


def write_predict(folder: Path) -> Path:
    """Write `folder`/predict.py, whole or not at all; nothing is written where it is there already.

    Raises ExportError where that fails.
    """
    path, text = folder / PREDICT, predict_py().encode()
    if not path.is_file() or path.read_bytes() != text:
        write_whole(path, text)
    return path


def _without_ours(name: str) -> str:
    """A module without its docstring and what it imports from those that stand before it."""
    source = _read(name)
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        ours = isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module == "__future__")
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if ours or said:
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines).strip() + "\n"


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
