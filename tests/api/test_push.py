"""`compress push`: the artifact on a Hugging Face Hub, which is a small server here."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from questpress.export.conversion.transformers_js import (
    describe_model,
    describe_processor,
    write_transformers_js,
)
from questpress.export.errors import ExportError
from questpress.export.runtime import Classifier, Preprocessing

from tests.support.little import compress, refused

REPO, TOKEN = "jane/colors", "hf_secret"


class Hub(ThreadingHTTPServer):
    """A server with the Hub's addresses for creating a repository and committing files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.exists, self.private = False, False
        self.refused: dict[str, int] = {}
        """Status by the end of an address."""
        self.requests: list[tuple[str, bytes]] = []
        self.files: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.reply(200 if self.server.exists else 404, {"id": REPO, "private": self.server.private})

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append((self.path, body))
        address = self.path.removeprefix(f"/api/models/{REPO}")
        status = next((code for end, code in hub.refused.items() if address.endswith(end)), 200)
        response: dict[str, Any] = {"error": "some\nreason", "url": f"{hub.url}/{REPO}"}
        response["errors"] = [{"message": "bad license"}] if address == "/api/validate-yaml" else []
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if status == 200 and address == "/api/repos/create":
            if hub.exists:
                status = 409
            else:
                options = json.loads(body)  # "private" until huggingface-hub 1
                hub.exists = True
                hub.private = bool(options.get("private")) or options.get("visibility") == "private"
        elif status == 200 and address == "/preupload/main":
            files = json.loads(body)["files"]
            response["files"] = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
        elif status == 200 and address == "/commit/main":
            for part in map(json.loads, body.splitlines()):
                if part["key"] == "file":
                    hub.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            response |= {"commitUrl": f"{hub.url}/{REPO}/commit/0a1b", "commitOid": "0a1b"}
        self.reply(status, response)

    def reply(self, status: int, response: dict[str, Any]) -> None:
        content = json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_only_the_artifact_is_uploaded(a_run: Path, hub: Hub) -> None:
    artifact = a_run / "artifact"
    content = {f.relative_to(artifact).as_posix(): f.read_bytes() for f in artifact.rglob("*") if f.is_file()}
    (artifact / "venv").mkdir()
    (artifact / "venv" / "pyvenv.cfg").write_text("home = /home/jane")
    (artifact / "photo.jpg").write_bytes(b"private")
    done = compress("push", a_run, REPO)
    assert (done.exit_code, done.stdout) == (0, f"{hub.url}/{REPO}\n"), (done.stderr, done.exception)
    assert hub.files == content and "README.md" in content
    assert not hub.private
    sent = b"".join(body for _, body in hub.requests) + b"".join(hub.files.values())
    for secret in (TOKEN, str(a_run.parent), str(Path.home())):
        assert secret.encode() not in sent


def test_dry_run_lists_the_files_and_sends_nothing(
    finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = compress("push", finished, REPO, "--dry-run")
    assert done.exit_code == 0, done.stderr
    *rows, total = done.stdout.splitlines()
    artifact = finished / "artifact"
    names = {f.relative_to(artifact).as_posix() for f in artifact.rglob("*") if f.is_file()}
    assert {row.split()[-1] for row in rows} == names
    assert total.startswith(f"{len(names)} files, ") and total.endswith(f"for {REPO}. Nothing was sent.")
    assert hub.requests == []


def test_private_repository_is_created_and_a_public_one_refused(finished: Path, hub: Hub) -> None:
    hub.exists = True
    refused(compress("push", finished, REPO, "--private"), 2, f"--private: {REPO} exists and is public")
    assert hub.files == {}
    hub.exists = False
    assert compress("push", finished, REPO, "--private").exit_code == 0
    assert hub.private and hub.files


@pytest.mark.parametrize(
    ("refusals", "message"),
    [
        ({"/create": 401}, "the Hub rejected the access token"),
        ({"/commit/main": 403}, "the access token has no permission to write there"),
        ({"/create": 400}, "the Hub refused the upload with status 400: some reason."),
        ({"/validate-yaml": 400}, "Invalid metadata in README.md. - bad license"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(
    finished: Path, hub: Hub, refusals: dict[str, int], message: str
) -> None:
    hub.refused = refusals
    refused(compress("push", finished, REPO), 1, f"Error: {REPO}: {message}")
    assert hub.files == {}


def test_missing_network_and_token_are_one_sentence(
    finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(compress("push", finished, REPO), 1, "the upload to http://127.0.0.1:9 failed (Connect")
    monkeypatch.delenv("HF_TOKEN")
    refused(compress("push", finished, REPO), 2, "There is no access token of the Hugging Face Hub.")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["colors", "jane/a/b", "jane/co lors", "../colors", "jane/-x", "jane/a.git"])
def test_malformed_repositories_are_refused(finished: Path, hub: Hub, name: str) -> None:
    refused(compress("push", finished, name), 2, "REPO must be USER/NAME", f"got {name!r}")
    assert hub.requests == []


def test_unfinished_and_damaged_runs_are_refused(a_run: Path, hub: Hub, tmp_path: Path) -> None:
    refused(compress("push", tmp_path, REPO), 2, "is not a run folder")
    model = a_run / "artifact" / "student.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(compress("push", a_run, REPO), 2, "student.onnx")
    record = json.loads((a_run / "run.json").read_text())
    del record["stages"]["report"], record["checksum"]
    (a_run / "run.json").write_text(json.dumps(record))
    refused(compress("push", a_run, REPO), 2, "is unfinished: report missing")
    assert hub.requests == []


def test_files_of_transformers_js_have_its_names_and_the_artifacts_logits(a_run: Path, hub: Hub) -> None:
    assert compress("push", a_run, REPO, "--transformers-js").exit_code == 0
    config, processor = (json.loads(hub.files[name]) for name in ("config.json", "preprocessor_config.json"))
    model = Classifier.load(a_run, file="student.onnx", threads=1)
    p = model.preprocessing
    assert config["id2label"] == {str(index): label for index, label in enumerate(model.labels)}
    assert [config["label2id"][label] for label in model.labels] == list(range(len(model.labels)))
    assert "transformers.js_config" not in config
    assert processor["size"] == {"shortest_edge": p.resize}
    assert processor["crop_size"] == {"height": p.size, "width": p.size}
    assert (processor["image_mean"], processor["image_std"]) == ([*p.mean], [*p.std])
    pixels = np.random.default_rng(0).integers(0, 256, (2, p.size, p.size, 3), dtype=np.uint8)
    inputs = model.to_input(pixels)
    for name, file in (("model", "student.onnx"), ("model_quantized", "student.int8.onnx")):
        session = ort.InferenceSession(hub.files[f"onnx/{name}.onnx"])
        (logits,) = session.run(["logits"], {"pixel_values": inputs})
        expected = Classifier.load(a_run, file=file, threads=1).logits(inputs)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert hub.files["student.onnx"] == (a_run / "artifact" / "student.onnx").read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"task": "multi-label"},
            "runs classifiers with one label per image, this is a model for multi-label",
        ),
        ({"input": "uint8"}, "passes normalized images, this model takes pixels. Export the run with"),
        ({"crop_mode": "border"}, "cannot add a border, which this run does by --resize pad"),
        ({"size": (64, 96)}, "crops to squares only, this model has another aspect ratio"),
    ],
)
def test_models_that_transformers_js_cannot_run_are_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    geometry = {key: change[key] for key in ("crop_mode", "size") if key in change}
    preprocessing = Preprocessing.create(**{"size": 64, **geometry})
    with pytest.raises(ExportError, match=f"transformers.js {problem}"):
        write_transformers_js(tmp_path, {**change, "preprocessing": preprocessing.to_dict()}, tmp_path)
    assert describe_processor(Preprocessing.create(64, 0.8, "bicubic", "squash"))["size"] == {
        "height": 80,
        "width": 80,
    }
    assert describe_model(["a"], has_int8=False)["transformers.js_config"] == {"dtype": "fp32"}
    assert list(tmp_path.iterdir()) == []
