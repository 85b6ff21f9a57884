"""The wheel: what lands on the user's machine."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "models", "export")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The files in a wheel built from a copy of the source."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the source is not here")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source),
    ]  # fmt: skip
    isolation = ["--no-build-isolation"] if recent_setuptools() else []
    built = subprocess.run([*command, *isolation], capture_output=True, text=True, timeout=100)
    if built.returncode and not isolation:
        pytest.skip("setuptools 77 or newer is neither here nor to be had")
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("questpress-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield {name for name in archive.namelist() if not name.endswith("/")}


def recent_setuptools() -> bool:
    if find_spec("setuptools") is None:
        return False
    from importlib.metadata import version

    return int(version("setuptools").split(".")[0]) >= 77


def test_wheel_has_every_python_file(names):
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            if "__pycache__" not in file.parts:
                assert f"questpress/{file.relative_to(ROOT).as_posix()}" in names


def test_wheel_has_the_templates_styles_and_type_markers(names):
    for ending in ("*.j2", "*.css", "*.yaml", "py.typed"):
        for room in ROOMS:
            for file in (ROOT / room).rglob(ending):
                assert f"questpress/{file.relative_to(ROOT).as_posix()}" in names
    for room in ROOMS:
        assert f"questpress/{room}/py.typed" in names
    assert any(name.endswith(".j2") for name in names)


def test_wheel_has_no_top_level_models_or_tests(names):
    tops = {name.split("/")[0] for name in names}
    assert "questpress" in tops
    assert {top for top in tops if not top.endswith(".dist-info")} == {"questpress"}
    assert not any("/tests/" in name for name in names)


def test_wheel_has_the_license_and_the_command(names):
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)
