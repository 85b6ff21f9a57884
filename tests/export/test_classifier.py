"""Labels and probabilities from an artifact folder or one file alone; what is damaged is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from questpress.export import runtime
from questpress.export.artifact import ShippedFile, write_manifest
from questpress.export.conversion.onnx_export import OnnxFile
from questpress.export.runtime import ArtifactError, Classifier, Preprocessing, manifest, processor, session

from tests.support.networks import LABELS, PREPROCESSING, color_classifier, onnx_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an artifact of two files."""
    folder = tmp_path / "run" / "artifact"
    folder.mkdir(parents=True)
    accuracy = {"top1": 97.5, "n": 200, "low": 94.3, "high": 98.9}
    shipped = [
        ShippedFile(onnx_file(color_classifier(folder / name)), precision, accuracy=accuracy)
        for name, precision in (("student.onnx", "fp32"), ("student.int8.onnx", "int8"))
    ]
    write_manifest(
        folder, files=shipped, preprocessing=PREPROCESSING, labels=LABELS, origin={"student": "colors"}
    )
    return tmp_path / "run"


def plain(*color: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(color), (5, 9, 3)).copy()


def test_probabilities_are_the_softmax_of_the_logits(run: Path) -> None:
    classifier = Classifier.load(run, threads=1)
    (prediction,) = classifier.predict([plain(255, 0, 51)], top=2)
    logits = np.array([10.0, 0.0, 2.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    assert prediction.label == "red" and [label for label, _ in prediction.top] == ["red", "blue"]
    np.testing.assert_allclose([prediction.probability, prediction.top[1][1]], expected[[0, 2]], rtol=1e-6)


def test_run_artifact_and_file_predict_alike(run: Path, tmp_path: Path) -> None:
    Image.fromarray(plain(10, 250, 30)).save(tmp_path / "green.png")
    lone = tmp_path / "elsewhere.onnx"
    lone.write_bytes((run / "artifact" / "student.onnx").read_bytes())
    sources = [tmp_path / "green.png", str(tmp_path / "green.png"), (tmp_path / "green.png").read_bytes()]
    for path in (run, run / "artifact", lone, str(lone)):
        predictions = Classifier.load(path, threads=1).predict(sources)
        assert [prediction.label for prediction in predictions] == ["green"] * 3
        assert len(predictions[0].top) == 3  # no more than there are classes


def test_one_image_of_any_kind_gives_one_prediction(run: Path, tmp_path: Path) -> None:
    classifier, file = Classifier.load(run, threads=1), tmp_path / "green.png"
    picture = Image.fromarray(plain(10, 250, 30))
    picture.save(file)
    for image in (file, str(file), file.read_bytes(), picture, plain(10, 250, 30)):
        for images in (image, [image]):
            [prediction] = classifier.predict(images)
            assert prediction.label == "green"
    frame = plain(10, 250, 200)
    assert classifier.predict(frame[:, :, ::-1])[0].top == classifier.predict(frame[..., ::-1].copy())[0].top
    assert len(classifier.predict(np.stack([frame, frame]))) == 2


def test_pil_image_is_shown_upright_on_white(run: Path) -> None:
    picture = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    picture.getexif()[0x0112] = 6
    pixels = Classifier.load(run, threads=1).decode(picture)
    assert pixels.shape == (3, 2, 3) and (pixels == 255).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 3)), r"got an array of float64 \[4, 4, 3\]"),
        ([np.zeros((4, 4), np.uint8)], r"got an array of uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"got an array of uint8 \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got an array of uint8 \[0, 4, 3\]"),
        (np.zeros(0), r"got an array of float64 \[0\]"),
        (Image.new("RGB", (0, 3)), "got a PIL image of 0 × 3 pixels"),
        ([[[255, 0, 0]]], "got list"),
        ([5], "got int"),
        (None, "got NoneType"),
    ],
)
def test_anything_but_images_is_refused_in_one_sentence(run: Path, images: Any, message: str) -> None:
    expected = r"an image must be a path, the bytes of a file, a PIL image or a uint8 array \[H, W, 3\], "
    with pytest.raises((TypeError, ValueError), match=f"^{expected}{message}$"):
        Classifier.load(run, threads=1).predict(images)


def test_images_are_predicted_in_order_and_in_batches(run: Path) -> None:
    images = [plain(*(255 * (np.arange(3) == i % 3))) for i in range(7)]
    predictions = Classifier.load(run, threads=1).predict(iter(images), batch_size=2)
    assert [prediction.label for prediction in predictions] == [LABELS[i % 3] for i in range(7)]
    assert Classifier.load(run, threads=1).predict([]) == []


def test_precision_and_file_choose_among_the_manifests_files(run: Path) -> None:
    assert Classifier.load(run).name == "student.int8.onnx"
    assert Classifier.load(run, precision="fp32").name == "student.onnx"
    assert Classifier.load(run, file="student.onnx").name == "student.onnx"
    for wrong in ("other.onnx", "../artifact/student.onnx"):
        with pytest.raises(ArtifactError, match=r"student\.onnx \(fp32\), student\.int8\.onnx \(int8\)"):
            Classifier.load(run, file=wrong)


def test_fp32_is_the_default_without_dot_products(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "lacks_dot_products", lambda: True)
    assert Classifier.load(run).name == "student.onnx"
    assert Classifier.load(run, precision="int8").name == "student.int8.onnx"


@pytest.mark.parametrize(
    ("int8", "change", "usual", "other"),
    [
        ((1, 2), {}, "student.int8.onnx", "student.int8.onnx"),
        ((5, 6), {}, "student.onnx", "student.onnx"),
        ((3, 5), {}, "student.int8.onnx", "student.onnx"),  # the intervals overlap
        ((1, 2), {"flags": [{"threads": 1}]}, "student.int8.onnx", "student.onnx"),
        ((1, 2), {"provider": "CUDAExecutionProvider"}, "student.int8.onnx", "student.onnx"),
        ((1, 2), {"results": [3]}, "student.int8.onnx", "student.onnx"),
    ],
)
def test_results_of_the_bench_decide_which_file_is_the_default(
    run: Path,
    int8: tuple[int, int],
    change: dict[str, Any],
    usual: str,
    other: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run / "artifact"
    results = [
        {
            "name": entry["name"],
            "sha256": entry["sha256"],
            "threads": 1,
            "latency_ms": {"p50": {"low": low, "high": high}},
        }
        for entry in json.loads((folder / "manifest.json").read_text())["files"]
        for low, high in [int8 if entry["precision"] == "int8" else (3, 4)]
    ]
    bench = {"results": results, "flags": [], "provider": runtime.CPU, **change}
    (folder / processor.bench_file_name(processor.processor_name())).write_text(json.dumps(bench))
    assert Classifier.load(run, threads=1).name == usual
    assert Classifier.load(run, threads=2).name == "student.int8.onnx"
    monkeypatch.setattr(manifest, "lacks_dot_products", lambda: True)
    assert Classifier.load(run, threads=1).name == other


def test_ort_file_is_loaded_with_its_metadata(run: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "student.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    metadata = runtime.build_metadata(PREPROCESSING, LABELS, {})
    file = color_classifier(tmp_path / "student.onnx", metadata)
    ort.InferenceSession(str(file), options, providers=[runtime.CPU])
    [prediction] = Classifier.load(tmp_path / "student.ort").predict(plain(255, 0, 51))
    assert prediction == Classifier.load(run, precision="fp32").predict(plain(255, 0, 51))[0]
    (tmp_path / "damaged.ort").write_bytes((tmp_path / "student.ort").read_bytes()[:900])
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot load damaged\.ort: "):
        Classifier.load(tmp_path / "damaged.ort")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_missing_providers_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (run, run / "artifact" / "student.onnx"):
        assert Classifier.load(path, providers=["CPUExecutionProvider"]).session.get_providers() == [
            runtime.CPU
        ]
        with pytest.raises(
            ArtifactError, match=r"has no provider 'NoProvider'\. Available: .*CPUExecutionProvider"
        ):
            Classifier.load(path, providers=["NoProvider", runtime.CPU])
    # ONNX Runtime lists a provider whose libraries are missing, and continues without it.
    monkeypatch.setattr(session, "_providers", lambda: ["CUDAExecutionProvider", runtime.CPU])
    with pytest.raises(ArtifactError, match="cannot start CUDAExecutionProvider"):
        Classifier.load(run, providers="CUDAExecutionProvider")


def test_damaged_file_is_refused(run: Path) -> None:
    path = run / "artifact" / "student.int8.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="is damaged: its sha256"):
        Classifier.load(run)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"is damaged: it has \d+ bytes"):
        Classifier.load(run)
    assert Classifier.load(run, precision="fp32").labels == tuple(LABELS)


def test_manifest_that_was_edited_by_hand_is_refused(run: Path) -> None:
    path = run / "artifact" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    edited = text.replace('"n": 200', '"n": 2000')
    assert edited != text
    path.write_text(edited, encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"manifest\.json was modified after it was written: .* again, or export"
    ):
        Classifier.load(run)
    # The same content in another hand: spaces, order and escapes are no change.
    manifest = json.loads(text)
    path.write_text(json.dumps(dict(reversed(manifest.items())), ensure_ascii=True), encoding="utf-8")
    assert Classifier.load(run).labels == tuple(LABELS)


def test_path_without_an_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"contains no manifest\.json"):
        Classifier.load(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Classifier.load(tmp_path / "nowhere")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ArtifactError, match="is not a valid ONNX file"):
        Classifier.load(tmp_path / "text.onnx")
    color_classifier(tmp_path / "bare.onnx", metadata={"made by": "someone else"})
    with pytest.raises(ArtifactError, match="no questpress metadata"):
        Classifier.load(tmp_path / "bare.onnx")
    color_classifier(tmp_path / "two.onnx", runtime.build_metadata(PREPROCESSING, ["red", "green"], {}))
    with pytest.raises(ArtifactError, match="3 outputs but 2 labels"):
        Classifier.load(tmp_path / "two.onnx")


def test_missing_files_of_an_artifact_are_named(run: Path) -> None:
    folder = run / "artifact"
    (folder / "student.int8.onnx").unlink()
    again = "Copy the artifact folder again"
    with pytest.raises(ArtifactError) as refusal:
        Classifier.load(run)
    assert str(refusal.value) == (
        f"{folder / 'student.int8.onnx'} is listed in manifest.json but missing. {again}, or use the "
        "fp32 file, student.onnx"
    )
    assert Classifier.load(run, file="student.onnx").labels == tuple(LABELS)
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"contains student.onnx but no manifest.json\\. {again}$"):
        Classifier.load(folder)
    (folder / "student.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"contains no manifest\.json\. Specify a run folder"):
        Classifier.load(folder)


def test_softmax_is_stable_for_large_logits() -> None:
    np.testing.assert_allclose(
        runtime.softmax(np.float32([[1000.0, 1000.0, -1000.0]])), [[0.5, 0.5, 0.0]], atol=1e-12
    )


def test_manifest_refuses_private_paths_and_damage(run: Path) -> None:
    folder = run / "artifact"
    before = (folder / "manifest.json").read_bytes()
    student = OnnxFile(folder / "student.onnx", 1, "0", 18, 8)

    def write(files: list[ShippedFile], origin: dict[str, object]) -> None:
        write_manifest(folder, files=files, preprocessing=PREPROCESSING, labels=LABELS, origin=origin)

    from questpress.export.errors import ExportError

    with pytest.raises(ExportError, match="local path"):
        write([], {"data": {"folder": str(folder.resolve())}})
    with pytest.raises(ExportError, match="local path"):
        write([], {"data": "~user/photos"})
    with pytest.raises(ExportError, match="must be distinct"):
        write([ShippedFile(student, "fp32"), ShippedFile(student, "int8")], {})
    with pytest.raises(ExportError, match="damaged"):
        write([ShippedFile(student, "fp32")], {})
    with pytest.raises(ExportError, match="cannot be written as JSON"):
        write([], {"accuracy": float("nan")})
    assert (folder / "manifest.json").read_bytes() == before
    assert (folder / "labels.txt").read_text() == "red\ngreen\nblue\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "labels.txt",
        "manifest.json",
        "selftest.json",
        "student.int8.onnx",
        "student.onnx",
    ]


def test_cgroups_quota_limits_the_cores(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    proc.write_text("0::/a/b\n")
    assert processor._cgroup_quota(proc, root) == float("inf")
    (inner / "cpu.max").write_text("max 100000\n")
    (root / "a" / "cpu.max").write_text("250000 100000\n")
    assert processor._cgroup_quota(proc, root) == 2.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert processor._cgroup_quota(proc, root) == 1.0  # less than one core is one thread still
    old = root / "cpu,cpuacct"
    old.mkdir()
    proc.write_text("4:memory:/x\n3:cpu,cpuacct:/docker/1\n")
    (old / "cpu.cfs_quota_us").write_text("300000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert processor._cgroup_quota(proc, root) == 3.0
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert processor._cgroup_quota(proc, root) == float("inf")
    assert processor._cgroup_quota(tmp_path / "none", root) == float("inf")
    assert runtime.allowed_cores() >= 1 and 1 <= runtime.default_threads() <= 4


def test_name_may_begin_with_a_tilde(run: Path) -> None:
    write_manifest(
        run / "artifact",
        files=[],
        preprocessing=PREPROCESSING,
        labels=LABELS,
        origin={"data": "~photos 2024"},
    )
    assert json.loads((run / "artifact" / "manifest.json").read_text())["origin"] == {"data": "~photos 2024"}


def test_network_may_rule_out_classes_by_minus_infinity(tmp_path: Path) -> None:
    file = color_classifier(tmp_path / "net.onnx")
    model = onnx.load(file)
    weights = np.float32(10) * np.eye(3, dtype=np.float32)
    weights[:, 2] = -np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "weights"))
    onnx.save(model, file)
    classifier = Classifier(file.read_bytes(), "net.onnx")
    classifier.preprocessing = Preprocessing.create(8, mean=(-1, -1, -1), std=(1, 1, 1))  # inputs above zero
    [prediction] = classifier.predict([np.full((8, 8, 3), 9, np.uint8)])
    assert dict(prediction.top)[LABELS[2]] == 0
