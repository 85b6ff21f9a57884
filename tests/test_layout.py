"""The layout of the code: which folder may import which, and how large files and folders may become."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("pipeline", "export", "models")

LAYERS = (
    "cli", "api", "stages", "training", "report", "tasks", "evaluation", "methods", "data", "runs", "config",
)  # fmt: skip
"""Folders of pipeline/. Each imports the ones after it, errors.py, models/ and export/."""

EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()
"""Imports (importer, imported) that go upwards."""

MOST_LEVELS = 17
MOST_ENTRIES = 12
MORE_ENTRIES = {
    "models": 14,  # a file for each step from a name to a network, and its parts
    "tests/models": 15,
    "pipeline": 13,  # eleven layers, errors.py and __main__.py
    "pipeline/api": 14,  # a file for each command, and their inputs
    "pipeline/methods": 16,  # a file for each method
    "pipeline/report": 14,  # a file for each way to show a result
    "tests/api": 13,  # a file for each command
    "tests": 25,  # the folders of the source, and tests of the whole repository
    "tests/data": 14,  # a file for each step from a file to a view
    "tests/support": 16,  # a file for each kind of toy
}
MOST_LINES = 450
MOST_SOURCE_FILES, MOST_SOURCE_LINES, MOST_TEST_LINES = 220, 41_972, 32_460
"""Only a new feature may raise these."""


@cache
def modules() -> dict[str, Path]:
    """Return the path of each module, such as pipeline.data.views."""
    paths = [path.relative_to(ROOT) for name in SOURCE for path in sorted((ROOT / name).rglob("*.py"))]
    return {
        ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts): path
        for path in paths
    }


def imports(module: str) -> Iterator[str]:
    """Yield the modules of ours that a module imports anywhere, those for type checkers included."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            name = name.removeprefix("questpress.")
            for imported in (name, name.rpartition(".")[0]):
                if imported in modules():
                    yield imported
                    break


@cache
def graph() -> Mapping[str, frozenset[str]]:
    return {module: frozenset(imports(module)) - {module} for module in modules()}


def is_allowed(importer: str, imported: str) -> bool:
    """Return True if the import goes downwards."""
    top, *inner = importer.split(".")
    other, *below = imported.split(".")
    if top != "pipeline" or other != "pipeline":
        return other == top or top == "pipeline"
    if not inner or inner == ["__main__"] or below == ["errors"]:
        return True
    if inner == ["errors"] or not below:
        return False
    return LAYERS.index(inner[0]) <= LAYERS.index(below[0])


LONGEST: dict[str, tuple[str, ...]] = {}


def chain(module: str, path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the longest chain of imports that starts at a module; fail on a circular import."""
    if module in path:
        pytest.fail(f"circle: {' > '.join((*path[path.index(module) :], module))}")
    if module not in LONGEST:
        chains = (chain(imported, (*path, module)) for imported in sorted(graph()[module]))
        LONGEST[module] = (module, *max(chains, key=len, default=()))
    return LONGEST[module]


def size() -> str:
    """Return the table of .ci/size."""
    return subprocess.run([sys.executable, ROOT / ".ci" / "size"], capture_output=True, text=True).stdout


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_folders_import_downwards_only() -> None:
    upward = {
        (importer, imported)
        for importer in graph()
        for imported in graph()[importer]
        if not is_allowed(importer, imported)
    }
    assert upward == EXCEPTIONS


def test_imports_form_no_circle_and_no_long_chain() -> None:
    longest = max((chain(module) for module in graph()), key=len)
    assert len(longest) <= MOST_LEVELS, f"{len(longest)} levels:\n" + "\n".join(longest)


def test_folders_have_few_entries() -> None:
    entries: dict[str, set[str]] = {}
    for path in python_files(*SOURCE, "tests", "benchmarks"):
        folder = path.parent
        if path.name != "__init__.py":
            entries.setdefault(folder.relative_to(ROOT).as_posix(), set()).add(path.name)
        elif folder.parent != ROOT:
            entries.setdefault(folder.parent.relative_to(ROOT).as_posix(), set()).add(folder.name)
    full = {
        name: sorted(inside)
        for name, inside in entries.items()
        if len(inside) > MORE_ENTRIES.get(name, MOST_ENTRIES)
    }
    assert not full


def test_files_are_short() -> None:
    files = {path.relative_to(ROOT).as_posix(): lines(path) for path in python_files(*SOURCE)}
    long = {name: count for name, count in files.items() if count > MOST_LINES}
    assert not long


def test_every_package_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["tool"]["setuptools"]["packages"]
    packages = {path.parent.relative_to(ROOT) for path in python_files(*SOURCE)}
    assert sorted(declared) == sorted(f"questpress.{'.'.join(package.parts)}" for package in packages)


def test_code_stays_small() -> None:
    source, tests = python_files(*SOURCE), python_files("tests")
    assert len(source) <= MOST_SOURCE_FILES, size()
    assert sum(map(lines, source)) <= MOST_SOURCE_LINES, size()
    campaigns = ROOT / "tests" / "campaigns"
    assert sum(lines(path) for path in tests if campaigns not in path.parents) <= MOST_TEST_LINES, size()
