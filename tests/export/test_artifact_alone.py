"""The artifact folder on a device, where there is nothing but numpy, Pillow and onnxruntime."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from questpress.export.runtime import Classifier

from tests.support import little

ALONE = """
import sys

ABLE = {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime", "sitecustomize"}
ABLE |= {"predict", "questpress_runtime", "cv2"}

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABLE and not name.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}: this is a bare device", name=name)

sys.meta_path.insert(0, Refusal())
"""

CAMERA = """
import numpy

class VideoCapture:
    def __init__(self, index):
        pass

    def read(self):
        return True, numpy.full((480, 640, 3), (0, 0, 255), numpy.uint8)  # red, in the order BGR
"""


@pytest.fixture(scope="module")
def device(finished: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact folder copied away, with a photo and a folder of them."""
    root = tmp_path_factory.mktemp("device")
    shutil.copytree(finished / "artifact", root / "artifact")
    (root / "bare").mkdir()
    (root / "bare" / "sitecustomize.py").write_text(ALONE)
    (root / "bare" / "cv2.py").write_text(CAMERA)
    shutil.copytree(data / "red", root / "photos" / "red")
    shutil.copy(data / "blue" / "003.png", root / "photos" / "blue one.PNG")
    (root / "photos" / "notes.txt").write_text("no image")
    shutil.copy(data / "blue" / "003.png", root / "artifact" / "photo.jpg")
    return root


def bare(device: Path, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """An interpreter that can import nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(device / "bare"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder or device, env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_artifact_writes_no_file_and_opens_no_connection(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    # ONNX Runtime 1.31 keeps a number for the device there, and sends it away.
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    for done in (
        predict(device, "photos/red/000.png"),
        subprocess.run(
            [sys.executable, "-c", "import questpress.export.int8.targets"], capture_output=True, text=True
        ),
        subprocess.run(
            little.command("predict", device / "artifact", device / "photos"), capture_output=True, text=True
        ),
    ):
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == []


def predict(device: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return bare(device, "artifact/predict.py", *arguments)


def test_artifact_predicts_as_the_package_to_the_bit(device: Path, finished: Path) -> None:
    done = predict(device, "--json", "--threads", "1", "--top", "3", "photos")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 21
    assert [row["image"] for row in rows[:2]] == ["photos/blue one.PNG", "photos/red/000.png"]
    ours = Classifier.load(finished / "artifact", threads=1)
    for row in rows:
        [expected] = ours.predict([device / row["image"]], top=3)
        assert [(a["label"], a["probability"]) for a in row["top"]] == expected.top


def test_bare_interpreter_is_bare(device: Path) -> None:
    done = bare(device, "-c", "import questpress")
    assert "bare device" in done.stderr
    assert "bare device" in bare(device, "-c", "import torch").stderr


def test_artifact_predicts_as_compress_predict(device: Path, finished: Path) -> None:
    photo = str(device / "photos" / "red" / "000.png")
    ours = little.compress("predict", finished, photo, "--threads", "1")
    assert predict(device, photo, "--threads", "1").stdout == ours.stdout
    assert re.match(r".*000\.png: \w+ [\d.]+ %, \w+ [\d.]+ %, \w+ [\d.]+ %\n", ours.stdout)


def test_compress_predict_takes_folders_too(device: Path, finished: Path) -> None:
    done = little.compress("predict", finished, device / "photos")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 21


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["nowhere.jpg"], 1, "cannot read nowhere.jpg: No such file or directory"),
        (["photos/notes.txt"], 1, "cannot read photos/notes.txt: not an image"),
        (["bare"], 1, "bare contains no images"),
        (["--provider", "NPU", "photos"], 1, "onnxruntime has no provider 'NPU'. Available: "),
        (["--file", "best.onnx", "photos"], 1, "contains no best.onnx"),
        (["--artifact", "photos", "photos"], 1, "photos contains no manifest.json"),
        (["--threads", "0", "photos"], 2, "must be a positive integer, got '0'"),
        (["--threads", "9" * 20, "photos"], 2, "must be at most 1024"),
        (["--tpo", "3", "photos"], 2, "unrecognized arguments: --tpo"),
        ([], 2, "an image or folder is required"),
        (["--self-test", "photos"], 2, "--self-test takes no images"),
        (["--self-test", "--bench"], 2, "--self-test and --bench cannot be used together"),
        (["--out", "results", "photos"], 2, "--out requires --bench"),
        (["--bench", "--seconds", "0"], 2, "--seconds: must be greater than 0, got '0'"),
        (["--bench", "--file", "best.onnx"], 1, "contains no best.onnx, it has student.int8.onnx"),
        (["--bench", "photos/notes.txt"], 1, "cannot read photos/notes.txt: not an image"),
    ],
)
def test_errors_of_predict_py_are_one_line(device: Path, arguments: list[str], code: int, error: str) -> None:
    done = predict(device, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ") and error in line


def test_readable_images_are_predicted_next_to_an_unreadable_one(device: Path) -> None:
    done = predict(device, "nowhere.jpg", "photos/blue one.PNG")
    assert done.returncode == 1
    assert done.stdout.startswith("photos/blue one.PNG: ") and "nowhere.jpg" in done.stderr


def test_missing_packages_are_named_with_a_command(device: Path, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.argv = ['predict.py', 'x']; runpy.run_path({str(device / 'artifact' / 'predict.py')!r}, run_name='__main__')"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without site-packages
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: numpy, pillow, onnxruntime not installed. Run pip install numpy pillow onnxruntime\n"
    )


def blocks(device: Path, language: str) -> list[str]:
    text = (device / "artifact" / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.S)


def test_every_line_of_python_in_the_readme_runs(device: Path) -> None:
    samples = blocks(device, "python")
    assert len(samples) == 3
    for code in samples:
        done = bare(device, "-c", code, folder=device / "artifact")
        assert (done.returncode, done.stderr) == (0, "")
        assert "cv2" not in code or done.stdout.startswith("red ")
    assert (device / "artifact" / "photo.ppm").read_bytes().startswith(b"P6\n16 16\n255\n")
    (device / "artifact" / "photo.ppm").unlink()


def test_every_predict_command_of_the_readme_runs(device: Path) -> None:
    """Those that install packages and the compiler's are not run here."""
    lines = [line for block in blocks(device, "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python predict.py")]
    others = {line.split()[0] for line in lines if line not in commands}
    assert len(commands) == 4 and others == {"pip", "python3", ".", "g++", "LD_LIBRARY_PATH=onnxruntime/lib"}
    for line in commands:
        is_bench = line.endswith("--bench")
        quick = ["--seconds", "0.02", "--out", str(device / "results")] if is_bench else []
        done = bare(device, *line.split()[1:], *quick, folder=device / "artifact")
        start = "Written to" if is_bench else "preprocessing: ok, " if "self-test" in line else "photo.jpg: "
        assert done.returncode == 0 and re.search(f"^{start}", done.stdout, re.M), done.stderr
    [results] = (device / "results").iterdir()
    assert json.loads(results.read_text("utf-8"))["results"][0]["name"] == "student.int8.onnx"


HOME = Path(os.environ.get("ONNXRUNTIME_HOME", "/nowhere"))


@pytest.mark.skipif(
    not (HOME / "include" / "onnxruntime_cxx_api.h").is_file() or shutil.which("g++") is None,
    reason="no g++, or no ONNX Runtime for C++: name a folder with include/ and lib/ in ONNXRUNTIME_HOME",
)
def test_cpp_sample_predicts_as_python(device: Path, tmp_path: Path) -> None:
    [source] = blocks(device, "cpp")
    (tmp_path / "classify.cpp").write_text(source)
    (tmp_path / "onnxruntime").symlink_to(HOME)
    lines = [line for block in blocks(device, "sh") for line in block.splitlines()]
    [compiled] = [line for line in lines if line.startswith("g++")]
    subprocess.run(compiled.split(), cwd=tmp_path, check=True, timeout=120)
    bare(device, "-c", blocks(device, "python")[-1], folder=device / "artifact")
    photo = device / "artifact" / "photo.ppm"
    done = subprocess.run(
        [tmp_path / "classify", device / "artifact" / "student.onnx", photo],
        env={**os.environ, "LD_LIBRARY_PATH": str(HOME / "lib")},
        capture_output=True,
        text=True,
        check=True,
    )
    photo.unlink()
    predicted = predict(device, "artifact/photo.jpg", "--file", "student.onnx", "--threads", "1", "--json")
    expected = json.loads(predicted.stdout)["top"]
    rows = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [label for label, _ in rows] == [entry["label"] for entry in expected]
    for (_, p), entry in zip(rows, expected, strict=True):
        assert float(p) == pytest.approx(entry["probability"], abs=1e-6)


def front(device: Path) -> dict:
    text = (device / "artifact" / "README.md").read_text(encoding="utf-8")
    _, written, _ = text.split("---\n", 2)
    fields = yaml.safe_load(written)
    assert isinstance(fields, dict)
    return fields


def test_card_is_updated_and_names_no_machine(finished: Path, tmp_path: Path) -> None:
    text = (finished / "artifact" / "README.md").read_text(encoding="utf-8")
    latency = little.report(finished)["student_int8"]["latency_ms"]["1"]
    assert "## Latency" in text and f"{latency['percentiles']['p50']['value']:.3g}"[:4] in text
    local = (str(finished.parent), str(tmp_path.parent), os.uname().nodename, str(Path.home()) + "/")
    assert not [name for name in local if name in text]
