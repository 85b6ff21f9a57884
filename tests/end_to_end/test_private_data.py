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
    folder = root / f"zq7{name}zq7" / "colors"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def elsewhere(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same run as ``finished``, of the same images in another folder, by another user, on another host,
    with an empty cache and other modification times.
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
        little.check_success(little.job(Path("../../zq7datazq7/colors"), out, places["cache"]))
        yield out / "artifact"


def forms(text: str) -> dict[str, bytes]:
    """Return the bytes of a text in each encoding: plain, two bytes a letter, hexadecimal, base64."""
    raw = text.encode()
    encodings = {"plain": raw, "utf-16": text.encode("utf-16-le"), "hex": raw.hex().encode()}
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        encodings[f"base64 from {shift}"] = coded[4 if shift else 0 : -4]
    return encodings


def test_artifact_names_no_user_host_or_path(elsewhere: Path) -> None:
    paths = (path for path in elsewhere.rglob("*") if path.is_file())
    content = {path.relative_to(elsewhere).as_posix(): path.read_bytes().lower() for path in paths}
    assert content.keys() == SHIPPED
    local_paths = {
        str(Path.home()), sys.prefix, sys.executable, str(Path(questpress.pipeline.__path__[0]).parent),
        str(Path(onnx.__file__).parent), os.path.realpath(tempfile.gettempdir()),
    }  # fmt: skip
    for text in ["zq7", "zq7" + SECRETS["USER"][3:], *(path for path in local_paths if len(path) > 5)]:
        for form, wanted in forms(text).items():
            # Three letters alone are found by chance where they are coded.
            if text == "zq7" and form != "plain":
                continue
            for name, held in content.items():
                assert wanted.lower() not in held, (name, form, text)


def test_search_finds_planted_strings() -> None:
    for shift in range(3):
        held = base64.b64encode(b"x" * shift + b"/home/username/photos" + b"y" * 5).lower()
        assert any(form.lower() in held for form in forms("/home/username/photos").values())
    assert forms("ab")["utf-16"] in "xxabxx".encode("utf-16-le")


def test_models_contain_no_private_strings(elsewhere: Path) -> None:
    for name in ("student.onnx", "student.int8.onnx"):
        model = onnx.load(elsewhere / name)
        assert b".py" not in (elsewhere / name).read_bytes() and not model.doc_string
        others = {entry.key for entry in model.metadata_props if not entry.key.startswith("questpress.")}
        assert others == {"names", "imgsz", "task", "stride"}
        graph = model.graph
        described = (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info, graph)
        assert not any(part.doc_string or part.metadata_props for part in described)


def test_same_inputs_make_the_same_bytes(elsewhere: Path, finished: Path) -> None:
    for name in sorted(SHIPPED - {"README.md"}):
        assert (elsewhere / name).read_bytes() == (finished / "artifact" / name).read_bytes(), name


def test_only_measured_times_differ_in_the_card(elsewhere: Path, finished: Path) -> None:
    def read_card(folder: Path) -> list[str]:
        """Return the lines above the latency section."""
        return (folder / "README.md").read_text().split("\n## Latency", 1)[0].splitlines()

    assert read_card(elsewhere) == read_card(finished / "artifact")
