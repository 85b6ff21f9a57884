"""The pages for a newcomer, run: getting-started.md command by command, python-api.md block by block."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import little

DOCS = Path(__file__).parents[1] / "docs"
NETWORKS = {"resnet50": little.TEACHER, "mobilenetv2": little.STUDENT}
TINY = {
    "--teacher": (
        "--teacher-weights", "none", *little.SMALL, *little.SHORT, "--set", "quest.words=8",
        "--cache", "cache",
    ),
    "bench": ("--quick", "--seconds", "0.1", "--threads", "1"),
}  # fmt: skip
"""What makes a command little: by its first word."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a newcomer is: with photos in folders, and one by itself."""
    monkeypatch.chdir(tmp_path)
    little.photos(tmp_path / "photos")
    little.photos(tmp_path / "more-photos", dict.fromkeys(little.CLASSES, 4), first=500)
    shutil.copy(tmp_path / "more-photos" / "red" / "000.png", tmp_path / "photo.jpg")
    return tmp_path


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_every_command_of_getting_started_runs(home):
    ran = []
    for words in commands("getting-started.md"):
        if words[0] == "compress" and words[1] != "doctor":
            words = [NETWORKS.get(word, word) for word in words[1:]]
            little.check_success(little.compress(*words, *TINY.get(words[0], ())))
            ran.append(words[0])
        elif words[0] == "scp":
            assert words[-1].startswith("pi@")
            shutil.copytree(words[-2], home / "pi" / Path(words[-2]).name)
        elif words[:2] == ["python", "artifact/predict.py"]:
            done = subprocess.run(
                [sys.executable, words[1], str(home / words[2])],
                cwd=home / "pi",
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert "photo.jpg: " in done.stdout and "%" in done.stdout
            ran.append("predict.py")
        else:  # installing, which .ci/run does; doctor, whose verdict is the machine's
            assert words[0] in ("python3", "pip") or words == ["compress", "doctor"], words
    assert ran == ["--teacher", "--teacher", "predict", "validate", "bench", "predict.py"]
    manifest = little.json.loads((home / "pi" / "artifact" / "manifest.json").read_text())
    assert {entry["target"] for entry in manifest["files"]} == {None, "arm64"}


@pytest.mark.usefixtures("home")
def test_every_block_of_the_python_page_runs(capsys):
    text = (DOCS / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "python-api.md", "exec"), {})
    output = capsys.readouterr().out
    assert re.search(r"[\d.]+ % \([\d.]+ to [\d.]+\), n = 6\n", output)
    assert re.search(r"[\d.]+ ms on one thread, 0\.\d+ MB\n", output)


@pytest.mark.parametrize(
    "line",
    re.findall(r"`(questpress\.pipeline[.\w]*)\(", (DOCS / "python-api.md").read_text(encoding="utf-8")),
)
def test_every_function_of_the_python_page_is_there(line):
    module, _, name = line.rpartition(".")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
