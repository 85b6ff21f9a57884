"""`compress bench`: timed files, reported results and output files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import questpress.pipeline.api.bench as verb
from questpress.export.results import Flag
from questpress.pipeline.api.bench import QUICK, bench
from questpress.pipeline.errors import JobError, UsageError
from questpress.pipeline.evaluation import latency
from questpress.pipeline.evaluation.latency import BenchCase
from questpress.pipeline.report.assemble import assemble, bench_facts
from questpress.pipeline.runs.artifacts import find_bench_files, find_teacher_files, read_input
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.runs.results import Bench

from tests.support import bench_reports
from tests.support.little import compress, refused
from tests.support.networks import color_classifier

SHORT = ("--seconds", "0.1", "--threads", "1", "--quick")


LITTLE = replace(QUICK, samples=0, cold_starts=1, end_to_end_seconds=0.05, batch_seconds=0.02, batches=(1, 4))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fresh process of each file, and two batches."""
    monkeypatch.setattr(verb, "QUICK", LITTLE)


@pytest.fixture(scope="module")
def timed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of a finished run after `compress bench`, and what that printed."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("timed") / "shop"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "QUICK", LITTLE)
        patch.setenv("COLUMNS", "80")
        result = compress("bench", run, *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    return run, result.stdout


def test_runs_teacher_and_both_files_are_timed_in_every_way(timed: tuple[Path, str]) -> None:
    run, _ = timed
    results = Bench.model_validate_json((run / "bench/bench.json").read_text())
    assert [(subject.name, subject.key) for subject in results.subjects] == [
        ("teacher", "teacher"), ("fp32", "student"), ("int8", "student_int8"),
    ]  # fmt: skip
    assert [subject.file for subject in results.subjects] == [
        "bench/teacher.onnx", "artifact/student.onnx", "artifact/student.int8.onnx",
    ]  # fmt: skip
    assert [(row.subject, row.over) for row in results.speedups] == [
        ("fp32", "teacher"), ("int8", "teacher"), ("int8", "fp32"),
    ]  # fmt: skip
    for row in results.latencies:
        median = row.percentiles["p50"]
        assert (
            row.n >= 11
            and len(row.quantiles) == 101
            and row.quantiles[50] == pytest.approx(median.value, rel=1e-4)
        )
        assert (median.low or 0) <= median.value <= (median.high or np.inf)
    assert {row.subject for row in results.end_to_end} == {"teacher", "fp32", "int8"}
    for steps in results.end_to_end:
        assert min(steps.decode, steps.resize, steps.normalize, steps.run) > 0
    assert results.images == "60 images of the run's data"
    assert {row.subject for row in results.cold_starts} == {"teacher", "fp32", "int8"}
    for start in results.cold_starts:
        assert min(start.import_ms, start.session_ms, start.first_run_ms) > 0
        assert (start.peak_bytes or 0) > (start.runtime_bytes or 0) > 1e7
    assert {(row.subject, row.batch) for row in results.throughput} == {
        (name, batch) for name in ("teacher", "fp32", "int8") for batch in (1, 4)
    }
    [conditions] = results.conditions
    assert conditions.rounds >= 20 and conditions.processes == 2 and len(conditions.cores) <= 1
    assert results.environment["cpu"] and results.session


def test_raw_samples_are_written_to_the_bench_folder(timed: tuple[Path, str]) -> None:
    run, _ = timed
    results = Bench.model_validate_json((run / "bench/bench.json").read_text())
    with np.load(run / "bench" / str(results.samples_file)) as raw:
        for row in results.latencies:
            samples = raw[f"{row.subject}/{row.threads}/ms"]
            assert len(samples) == len(raw[f"{row.subject}/{row.threads}/round"]) == row.n
            assert row.mean == pytest.approx(samples.mean())
        assert len(raw["sentinel/1/ms"]) == results.conditions[0].rounds
        steps = raw["int8/1/from image file/ms"]
        assert steps.shape[1] == 4


def test_report_shows_the_bench(timed: tuple[Path, str], finished: Path) -> None:
    run, _ = timed
    results = json.loads((run / "bench/bench.json").read_text())
    report = json.loads((run / "report.json").read_text())
    before = json.loads((finished / "report.json").read_text())
    assert report["bench"] == results != before["bench"]
    [int8] = [row for row in results["latencies"] if row["subject"] == "int8"]
    assert report["student_int8"]["latency_ms"]["1"]["percentiles"] == int8["percentiles"]
    assert {row["over"] for row in report["student_int8"]["speedups"]} == {"teacher", "student"}
    assert report["student_int8"]["score"] == before["student_int8"]["score"]
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    for title in (
        "Latency percentiles",
        "Speedup",
        "End-to-end latency, from image file to prediction",
        "Cold start",
        "Throughput",
    ):
        assert f"<h3>{title}</h3>" in page or f"<summary>{title} " in page, title
        assert title in text
    assert 'class="histogram student_int8"' in page
    assert results["command"] in page and "```sh" in text


def test_later_bench_of_other_files_is_not_shown(timed: tuple[Path, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(timed[0], tmp_path / "run"))
    later = json.loads((run / "bench/bench.json").read_text())
    later["subjects"][1]["sha256"], later["checksum"] = "0" * 64, None
    (run / "bench/bench.json").write_text(json.dumps(later))
    folder = RunFolder(run, writes=False)
    folder.open(fresh=False)
    report = assemble(folder)
    assert report.bench is not None and report.bench.subjects[1].name == "student"


def test_terminal_shows_tables_of_80_columns(timed: tuple[Path, str]) -> None:
    run, shown = timed
    lines = shown.splitlines()
    tables = (line.rstrip() for line in lines if not line.startswith(("Report", "Results")))
    assert max(len(line) for line in tables if not line.endswith(".")) <= 80
    for title in ("Latency in ms, batch size 1", "Speedup", "Cold start", "Throughput"):
        assert title in shown
    assert f"Report:  {run / 'report.html'}" in lines
    assert f"Results: {run / 'bench/bench.json'}" in lines


def test_plain_files_are_compared_in_their_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        color_classifier(tmp_path / folder / "net.onnx", {}, 8)
    result = compress("bench", "a/net.onnx", "b/net.onnx", *SHORT, "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    results = Bench.model_validate_json(result.stdout)
    assert [subject.name for subject in results.subjects] == ["a/net", "b/net"]
    assert results.subjects[0].inputs == "64 random inputs" and not results.end_to_end
    assert [(row.subject, row.over) for row in results.speedups] == [("b/net", "a/net")]
    assert results == Bench.model_validate_json((tmp_path / "bench-results/bench.json").read_text())


def test_strict_fails_after_saving_if_a_flag_is_raised(
    timed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Bench.model_validate_json((timed[0] / "bench/bench.json").read_text())
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    steal = Flag(name="steal", threads=1, sentence="The host gave 5 % of its cores to others.")

    def bench_with(*flags: Flag) -> None:
        output = results.model_copy(update={"flags": list(flags)}), {"a": np.zeros(1)}
        monkeypatch.setattr(verb.latency, "measure", lambda *_, **__: output)

    bench_with()
    assert compress("bench", file, "--strict", "--out", tmp_path / "quiet").exit_code == 0
    bench_with(steal)
    result = compress("bench", file, "--strict", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "--strict: the measurement was disturbed (steal)." in result.stderr
    assert steal.sentence in " ".join(result.stdout.split())
    kept = Bench.model_validate_json((tmp_path / "out/bench.json").read_text())
    assert [flag.name for flag in kept.flags] == ["steal"] and (tmp_path / "out/bench.npz").exists()
    assert compress("bench", file, "--out", tmp_path / "out").exit_code == 0


def test_bench_of_latency_alone_does_not_check_the_time_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "QUICK", replace(LITTLE, cold_starts=0, end_to_end_seconds=0, batch_seconds=0))
    monkeypatch.setattr(verb.latency.noise, "check_since", pytest.fail)
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    assert compress("bench", file, *SHORT, "--out", tmp_path / "out").exit_code == 0


def test_one_path_or_a_list_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_names(subjects: list[BenchCase], *_: object, **__: object) -> None:
        raise JobError(" ".join(case.file.name for case in subjects))

    monkeypatch.setattr(verb.latency, "measure", raise_names)
    first, second = (str(color_classifier(tmp_path / f"{name}.onnx", {}, 8)) for name in ("a", "b"))
    for paths, names in ((first, "a"), (Path(second), "b"), ([first, second], "a b")):
        with pytest.raises(JobError, match=f"^{names}$"):
            bench(paths, out=tmp_path / "out", quiet=True)
    with pytest.raises(UsageError, match="At least one run folder"):
        bench([], out=tmp_path / "out", quiet=True)


def write_with_input(path: Path, dims: list[int | str], kind: int = onnx.TensorProto.FLOAT) -> Path:
    """Write a network that declares another input."""
    model = onnx.load(color_classifier(path, {}, 8))
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("input", kind, dims))
    onnx.save(model, path)
    return path


def test_input_of_a_file_is_reported(tmp_path: Path) -> None:
    fixed = read_input(write_with_input(tmp_path / "a.onnx", [1, 3, 8, 8]))
    assert (fixed.shape, fixed.any_batch, fixed.has_metadata, str(fixed)) == (
        (3, 8, 8),
        False,
        False,
        "float32 [1, 3, 8, 8]",
    )
    open_ = read_input(write_with_input(tmp_path / "b.onnx", ["n", 3, "h", "w"]), image_size=16)
    assert (open_.shape, open_.any_batch) == ((3, 16, 16), True)
    wide = read_input(write_with_input(tmp_path / "d.onnx", ["n", 3, "h", "w"]), image_size=(16, 24))
    assert wide.shape == (3, 16, 24)
    pixels = read_input(write_with_input(tmp_path / "c.onnx", ["n", 8, 8, 3], onnx.TensorProto.UINT8))
    assert (pixels.shape, pixels.kind) == ((8, 8, 3), np.uint8)


def test_invalid_bench_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    refused(compress("bench", tmp_path / "text.onnx"), 2, "text.onnx", "is not an ONNX file")
    (tmp_path / "empty.onnx").touch()
    refused(compress("bench", tmp_path / "empty.onnx"), 2, "empty.onnx", "contains no network")
    refused(compress("bench", tmp_path / "none.onnx"), 2, "none.onnx does not exist")
    refused(compress("bench", tmp_path), 2, "manifest.json")
    file = write_with_input(tmp_path / "open.onnx", [1, 3, "h", "w"])
    refused(compress("bench", file), 2, "--image-size")
    file = write_with_input(tmp_path / "batch.onnx", [4, 3, 8, 8])
    refused(compress("bench", file), 2, "batch.onnx has a fixed batch size of 4")
    file = write_with_input(tmp_path / "huge.onnx", [1, 3, 1_000_000, 9])
    refused(compress("bench", file), 2, "at most 8,192")
    file = write_with_input(tmp_path / "words.onnx", [1, 77], onnx.TensorProto.INT64)
    refused(compress("bench", file), 2, "int64 [1, 77]")
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    refused(compress("bench", file, "--threads", "two"), 2, "got two")
    refused(compress("bench", file, "--threads", "0"), 2, "--threads must be 1 to 1024, got 0")
    refused(compress("bench", file, "--seconds", "0"), 2, "--seconds must be greater than 0")
    refused(compress("bench", file, "--seconds", "inf"), 2, "got inf")
    refused(compress("bench", file, "--threads", "1000000"), 2, "1 to 1024")
    refused(compress("bench", file, "--seed", "-1"), 2, "got -1")
    refused(compress("bench", file, "--images", tmp_path / "photos"), 2, "photos", "--images")
    refused(compress("bench", file, "--images", tmp_path / "text.onnx"), 2, "none of the images can be read")
    (tmp_path / "file").touch()
    refused(compress("bench", file, "--out", tmp_path / "file"), 2, "--out", "file")


def test_image_size_without_effect_is_reported(tmp_path: Path) -> None:
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    result = compress("bench", file, "--image-size", "9", *SHORT, "--out", tmp_path / "b")
    assert result.exit_code == 0 and "--image-size has no effect" in result.stderr


def test_external_weights_are_refused(tmp_path: Path) -> None:
    model = onnx.load(color_classifier(tmp_path / "net.onnx", {}, 8))
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights")
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"in another file '\.\./weights'"):
        read_input(tmp_path / "net.onnx")


def test_runtime_that_is_missing_is_named_with_the_command_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    monkeypatch.setattr("questpress.export.latency.machine.find_spec", lambda _: None)
    refused(compress("bench", file, "--runtime", "openvino"), 2, "pip install 'openvino>=2025.0'")


def test_files_for_other_processors_are_left_out_and_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded = {"x86": "made for x86", "x86-vnni": "made for x86-vnni", "arm64": "made for arm64"}
    monkeypatch.setattr("questpress.pipeline.runs.artifacts.explain_untimed", lambda _: excluded)
    result = find_bench_files([finished], tmp_path)
    assert [file.name for file in result.files] == ["teacher", "fp32"]
    assert len(result.notes) == 1 and result.notes[0].startswith("student.int8.onnx is made for")


def test_runs_have_distinct_names(finished: Path, tmp_path: Path) -> None:
    names = [file.name for file in find_bench_files([finished, finished / "artifact"], tmp_path).files]
    assert names == ["colors teacher", "colors fp32", "colors int8", "artifact fp32", "artifact int8"]


def test_few_pictures_give_different_inputs() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    inputs = latency.repeat_shifted(pictures, 20)
    assert len({image.tobytes() for image in inputs}) == 20
    np.testing.assert_array_equal(inputs[:3], pictures)


def test_generated_photos_are_deterministic_and_photo_sized() -> None:
    first, again = latency.synthesize_images(5, 1), latency.synthesize_images(5, 1)
    assert first == again != latency.synthesize_images(6, 1)
    assert 100_000 < len(first.contents[0]) < 600_000


def test_images_without_effect_are_reported(
    timed: tuple[Path, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Bench.model_validate_json((timed[0] / "bench/bench.json").read_text())
    monkeypatch.setattr(verb.latency, "measure", lambda *_, **__: (results, {"a": np.zeros(1)}))
    file = color_classifier(tmp_path / "net.onnx", {}, 8)
    result = compress("bench", file, "--images", data, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "--images has no effect" in result.stderr


def test_teachers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    for number in range(12):
        (tmp_path / "bench" / f"teacher.{number}.onnx").touch()
    (tmp_path / "bench" / "teacher.old.onnx").touch()
    names = [file.name for file in find_teacher_files(tmp_path)]
    assert names == [f"teacher.{number}.onnx" for number in range(12)]
    (tmp_path / "bench" / "teacher.onnx").touch()
    assert [file.name for file in find_teacher_files(tmp_path)] == ["teacher.onnx"]


def test_latencies_of_many_teachers_keep_their_order() -> None:
    results = bench_reports.bench()
    timed = [
        row.model_copy(update={"name": f"teacher {t}", "key": f"teacher {t}"})
        for t in range(12)
        for row in results.subjects[:1]
    ]
    times = [
        row.model_copy(update={"subject": f"teacher {t}", "mean": float(t)})
        for t in range(12)
        for row in results.latencies[:1]
    ]
    facts = bench_facts(results.model_copy(update={"subjects": timed, "latencies": times, "speedups": []}))
    means = [next(iter(teacher["latency_ms"].values()))["mean"] for teacher in facts["teachers"]]
    assert means == [float(t) for t in range(12)]


def test_extra_file_does_not_disable_checksums(a_run: Path) -> None:
    file = a_run / "artifact" / "student.onnx"
    (a_run / "artifact" / "student.onnx.data").touch()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused(compress("bench", a_run), 2, "student.onnx is damaged")
