"""bench: measure the latency of teachers and student on this machine."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...export.conversion.onnx_export import OUTPUT, check_parity, export_onnx
from ...export.runtime import ImageError, allowed_cores, build_metadata, decode_image, normalize
from ...models.checkpoint import tensors_digest
from ..config.network import NetworkSpec
from ..data.training_data import TrainingData
from ..evaluation import latency
from ..report.assemble import LATER_BENCH, bench_facts
from ..runs.files import atomic_write, link_or_copy
from ..runs.folder import StageResult
from ..runs.hashes import digest, sha256
from ..runs.results import Bench, Int8Search, TimedFile
from ..training.context import RunContext
from ..training.weights import load_network
from .export import STUDENT_ONNX

FOLDER = Path("bench")
SAMPLES = FOLDER / "latency.npz"

EXPORTED = "exported-teachers"

MAX_THREADS = 4

SHORT = latency.Protocol(
    seconds=1.0,
    samples=0,
    processes=2,
    threads=(),
    cold_starts=2,
    end_to_end_seconds=0.5,
    batch_seconds=0.15,
    batches=(1, 4, 16),
)
"""The protocol of `compress bench` in less time."""

MIN_SECONDS = 1.0
"""A shorter bench measures latency only, with one process for each file."""


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    folder, several = context.folder.path, len(context.teachers) > 1
    subjects: list[latency.BenchCase] = []
    teachers: list[dict[str, Any]] = []
    for t, spec in enumerate(context.teachers):
        file = FOLDER / (f"teacher.{t}.onnx" if several else "teacher.onnx")
        size = _export_teacher(context, data, spec, folder / file)
        teachers.append({"bytes": size, "file": file.as_posix()})
        name = f"teacher {t}" if several else "teacher"
        subjects.append(_subject(data, folder, name, file, spec))
    files = {"student": STUDENT_ONNX, **_int8_file(context, previous)}
    pixels = context.has_pixel_input
    for name, file in files.items():
        any_batch = context.options.batch == "dynamic"
        subject = _subject(data, folder, name, file, context.student, pixels=pixels, any_batch=any_batch)
        subjects.append(subject)
    bench, raw = latency.measure(
        subjects,
        _protocol(context),
        images=_choose_images(data),
        command=context.folder.record.command,
        progress=lambda fraction, work: context.progress.update(
            "measuring latency", fraction, 1.0, more=work
        ),
    )
    bench = bench.model_copy(update={"samples_file": SAMPLES.as_posix()})
    with atomic_write(folder / SAMPLES) as part, part.open("wb") as stream:
        np.savez_compressed(stream, **raw)  # type: ignore[arg-type]
    (folder / LATER_BENCH).unlink(missing_ok=True)
    for flag in bench.flags:
        threads = f"{flag.threads} thread{'s' if flag.threads > 1 else ''}"
        context.display.note(f"{threads}: {flag.sentence}")
    # The weights of a teacher beyond 2 GB are in a separate file.
    exported = [f"{teacher['file']}{suffix}" for teacher in teachers for suffix in ("", ".data")]
    outputs = [SAMPLES.as_posix(), *(file for file in exported if (folder / file).exists())]
    return StageResult(_summarize(bench), outputs, _facts(bench, teachers))


def _protocol(context: RunContext) -> latency.Protocol:
    o = context.options
    threads = tuple(sorted({1, min(allowed_cores(), MAX_THREADS)}))
    protocol = replace(SHORT, seconds=o.bench_seconds, threads=threads, seed=o.seed)
    if o.bench_seconds < MIN_SECONDS:
        return replace(protocol, processes=1, cold_starts=0, end_to_end_seconds=0.0, batch_seconds=0.0)
    return protocol


def _choose_images(data: TrainingData) -> latency.Images:
    """Return encoded test images of the data; synthetic ones if it has no image files."""
    contents = []
    for image in data.dataset.test[: latency.INPUTS]:
        content = image.read()
        if isinstance(content, bytes):
            try:
                decode_image(content)
            except ImageError:  # already reported as skipped
                continue
            contents.append(content)
    if contents:
        return latency.Images(contents, f"{len(contents)} test images")
    return latency.synthesize_images(data.options.seed)


def _int8_file(context: RunContext, previous: Mapping[str, Any]) -> dict[str, Path]:
    """Return the first target's int8 file, if there is one and this machine can measure it."""
    searches = [Int8Search.model_validate(search) for search in previous["int8"]]
    for search in searches:
        if search.file is not None and search.not_timed is not None:
            context.display.note(f"{search.file} is {search.not_timed}")
    first = searches[0]
    return {} if first.file is None or first.not_timed is not None else {"student_int8": Path(first.file)}


def _export_teacher(context: RunContext, data: TrainingData, spec: NetworkSpec, path: Path) -> int:
    """Export a teacher, for the bench only; return its size in bytes with external weights.

    The cache keeps the file for other students of this teacher.
    """
    metadata = build_metadata(spec.preprocessing, data.classes if spec.classes else (), {"name": spec.name})

    def write(folder: Path) -> None:
        network = load_network(context.folder.path, spec)
        output = OUTPUT if spec.classes else "features"
        export_onnx(network, folder / path.name, spec.image_size, metadata=metadata, output=output)
        pixels, _, _ = data.rendered("test", spec)
        images = torch.from_numpy(normalize(pixels[:8].numpy(), spec.preprocessing))
        check_parity(network, folder / path.name, images)

    key = digest(
        {
            "weights": tensors_digest(context.folder.path / spec.file),
            "network": [spec.name, spec.classes, str(spec.image_size), path.name, metadata],
            "versions": [torch.__version__, version("questpress")],
        }
    )
    entry = context.cache.get(EXPORTED, key) or context.cache.put(EXPORTED, key, write)
    path.parent.mkdir(exist_ok=True)
    size = 0
    for file in entry.glob(f"{path.name}*"):  # weights beyond 2 GB are in a second one
        link_or_copy(file, path.with_name(file.name))
        size += file.stat().st_size
    return size


def _subject(
    data: TrainingData,
    run: Path,
    name: str,
    file: Path,
    spec: NetworkSpec,
    *,
    pixels: bool = False,
    any_batch: bool = False,
) -> latency.BenchCase:
    """Describe a file to measure, which takes uint8 ``pixels`` or normalized images."""
    rendered, _, _ = data.rendered("test", spec)
    inputs = latency.repeat_shifted(rendered[: latency.INPUTS].numpy(), latency.INPUTS)
    if not pixels:
        inputs = normalize(inputs, spec.preprocessing)
    path = run / file
    parts = [part for part in (path, path.with_name(f"{path.name}.data")) if part.exists()]
    return latency.BenchCase(
        TimedFile(
            name=name,
            key=name,
            file=file.as_posix(),
            sha256=sha256(path),
            bytes=sum(part.stat().st_size for part in parts),
            runtime="onnxruntime",
            input=f"{inputs.dtype} [1, {', '.join(map(str, inputs.shape[1:]))}]",
            inputs=f"{min(latency.INPUTS, len(rendered))} test images",
        ),
        path,
        inputs,
        any_batch=any_batch,
        classifies=spec.classes > 0 and name.startswith("student"),
    )


def _facts(bench: Bench, teachers: list[dict[str, Any]]) -> dict[str, Any]:
    facts = bench_facts(bench)
    teachers = [{**file, **measured} for file, measured in zip(teachers, facts["teachers"], strict=True)]
    # The size of an ensemble is that of its members; its latency is not measured.
    ensemble = {"bytes": sum(teacher["bytes"] for teacher in teachers)}
    return {**facts, "teachers": teachers, "teacher": teachers[0] if len(teachers) == 1 else ensemble}


def _summarize(bench: Bench) -> str:
    parts = []
    for n in bench.threads:
        latencies = [latency for latency in bench.latencies if latency.threads == n]
        is_disturbed = n in bench.disturbed_threads
        medians = [latency.processor_ms if is_disturbed else latency.p50 for latency in latencies]
        values = " / ".join(f"{ms:.3g}" if ms else "–" for ms in medians)
        unit = "ms of processor time" if is_disturbed else "ms"
        parts.append(f"{values} {unit} on {n} thread{'s' if n > 1 else ''}")
    subjects = " / ".join(subject.name.replace("_", " ") for subject in bench.subjects)
    return f"p50 of {subjects}: {'; '.join(parts)}"
