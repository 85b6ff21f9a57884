"""The artifact contains no private data, and equal inputs make equal bytes."""

import base64
import getpass
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import questpress.pipeline
from questpress.export.artifact import runtime_files

from tests.support import little

SECRETS = {
    name: f"zq7{name.lower().replace('_', '')}zq7"
    for name in (
        *("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOST", "COMPUTERNAME", "MAIL", "SSH_CONNECTION"),
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "CI_JOB_TOKEN", "WANDB_API_KEY", "A_SECRET", "OLDPWD"),
    )
}
PLACES = ("home", "data", "out", "cache", "cwd", "temporary")
NODE = "zq7nodezq7"
SHIPPED = {
    "student.onnx",
    "student.int8.onnx",
    "manifest.json",
    "selftest.json",
    "labels.txt",
    "README.md",
    *runtime_files(),
}


def place(root: Path, name: str) -> Path:
    folder = root / f"zq7{name}zq7" / "colours"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def elsewhere(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same run as ``finished``, of the same images in another folder, by somebody else, on another host,
    without what was stored, and with other times of its files.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    places = {name: place(root, name) for name in PLACES}
    shutil.copytree(data, places["data"], dirs_exist_ok=True)
    for number, file in enumerate(sorted(places["data"].rglob("*.png"))):
        os.utime(file, (number, number))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(places["home"]))
        patch.setenv("TMPDIR", str(places["temporary"]))
        patch.setenv("TZ", "Pacific/Kiritimati")
        patch.setattr(tempfile, "tempdir", str(places["temporary"]))
        patch.setattr(socket, "gethostname", lambda: NODE)
        patch.setattr(platform, "node", lambda: NODE)
        patch.chdir(places["cwd"])
        assert getpass.getuser() == SECRETS["LOGNAME"]
        out = places["out"] / "run"
        little.check_success(little.job(Path("../../zq7datazq7/colours"), out, places["cache"]))
        yield out / "artifact"


def forms(text: str) -> dict[str, bytes]:
    """As bytes may hide in a file: plain, in two bytes a letter, in hexadecimal digits, in base64."""
    raw = text.encode()
    found = {"plain": raw, "utf-16": text.encode("utf-16-le"), "hex": raw.hex().encode()}
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        found[f"base64 from {shift}"] = coded[4 if shift else 0 : -4]
    return found


def test_artifact_names_no_user_host_or_path(elsewhere: Path) -> None:
    paths = (path for path in elsewhere.rglob("*") if path.is_file())
    content = {path.relative_to(elsewhere).as_posix(): path.read_bytes().lower() for path in paths}
    assert content.keys() == SHIPPED
    known = {
        str(Path.home()), sys.prefix, sys.executable, str(Path(questpress.pipeline.__path__[0]).parent),
        str(Path(onnx.__file__).parent), os.path.realpath(tempfile.gettempdir()),
    }  # fmt: skip
    for text in ["zq7", "zq7" + SECRETS["USER"][3:], *(one for one in known if len(one) > 5)]:
        for form, wanted in forms(text).items():
            # Three letters alone are found by chance where they are coded.
            if text == "zq7" and form != "plain":
                continue
            for name, held in content.items():
                assert wanted.lower() not in held, (name, form, text)


def test_search_finds_planted_strings() -> None:
    for shift in range(3):
        held = base64.b64encode(b"x" * shift + b"/home/somebody/photos" + b"y" * 5).lower()
        assert any(one.lower() in held for one in forms("/home/somebody/photos").values())
    assert forms("ab")["utf-16"] in "xxabxx".encode("utf-16-le")


def test_models_contain_no_foreign_strings(elsewhere: Path) -> None:
    for name in ("student.onnx", "student.int8.onnx"):
        model = onnx.load(elsewhere / name)
        assert b".py" not in (elsewhere / name).read_bytes() and not model.doc_string
        others = {one.key for one in model.metadata_props if not one.key.startswith("questpress.")}
        assert others == {"names", "imgsz", "task", "stride"}
        graph = model.graph
        described = (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info, graph)
        assert not any(one.doc_string or one.metadata_props for one in described)


def test_same_inputs_make_the_same_bytes(elsewhere: Path, finished: Path) -> None:
    for name in sorted(SHIPPED - {"README.md"}):
        assert (elsewhere / name).read_bytes() == (finished / "artifact" / name).read_bytes(), name


def test_only_measured_times_differ_in_the_card(elsewhere: Path, finished: Path) -> None:
    def told(folder: Path) -> list[str]:
        """The lines up to the section of times."""
        return (folder / "README.md").read_text().split("\n## Latency", 1)[0].splitlines()

    assert told(elsewhere) == told(finished / "artifact")
