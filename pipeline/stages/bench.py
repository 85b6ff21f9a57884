"""bench: latency of teacher and student, each file in its own processes on this machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...export.conversion.onnx_export import OUTPUT, check_parity, export_onnx
from ...export.runtime import ImageError, allowed_cores, decode_image, metadata, normalise
from ..evaluation.latency import (
    INPUTS,
    Images,
    Protocol,
    Subject,
    measure,
    repeat_shifted,
    synthesize_images,
)
from ..report.assemble import LATER, bench_facts
from ..runs.bench_results import Bench, TimedFile
from ..runs.files import atomic_write, sha256
from ..runs.folder import StageResult
from ..runs.results import Int8Search
from ..training.job import Job, NetworkSpec, takes_pixels
from ..training.weights import trained_network
from .export import STUDENT_ONNX, origin

FOLDER = Path("bench")
SAMPLES = FOLDER / "latency.npz"

MOST_THREADS = 4

SHORT = Protocol(
    seconds=2.0,
    samples=0,
    processes=2,
    threads=(),
    cold_starts=2,
    end_to_end_seconds=0.5,
    batch_seconds=0.15,
    batches=(1, 4, 16),
)
"""Within a run: what `compress bench` does in more time."""

LEAST_SECONDS = 1.0
"""Shorter benches have one process of each file, and nothing beside the latencies."""


def run(job: Job) -> StageResult:
    teachers = [_export_teacher(job, t) for t in range(len(job.teachers))]
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {t}" for t in range(len(teachers))]
    files = dict(zip(names, [file for file, _ in teachers], strict=True))
    own = {"student": STUDENT_ONNX} | _int8(job)
    subjects = [
        *(_subject(job, name, file, job.teachers[t]) for t, (name, file) in enumerate(files.items())),
        *(_subject(job, name, file, job.student, pixels=takes_pixels(job)) for name, file in own.items()),
    ]
    found, raw = measure(
        subjects,
        _protocol(job),
        images=_choose_images(job),
        command=job.folder.record.command,
        progress=lambda share, what: job.stage.update("timing", share, 1.0, more=what),
    )
    found = found.model_copy(update={"samples_file": SAMPLES.as_posix()})
    with atomic_write(job.folder.path / SAMPLES) as part, part.open("wb") as file:
        np.savez_compressed(file, **raw)  # type: ignore[arg-type]
    (job.folder.path / LATER).unlink(missing_ok=True)
    for flag in found.flags:
        job.display.note(f"{flag.threads} thread{'s' if flag.threads > 1 else ''}: {flag.sentence}")
    # Of a teacher beyond 2 GB, the weights lie beside the graph.
    beside = [file.with_name(f"{file.name}.data") for file in files.values()]
    weights = [file for file in beside if (job.folder.path / file).exists()]
    outputs = [file.as_posix() for file in (SAMPLES, *files.values(), *weights)]
    return StageResult(_line(found), outputs, _facts(found, teachers))


def _protocol(job: Job) -> Protocol:
    seconds = job.options.bench_seconds
    threads = tuple(sorted({1, min(allowed_cores(), MOST_THREADS)}))
    plan = replace(SHORT, seconds=seconds, threads=threads, seed=job.options.seed)
    if seconds < LEAST_SECONDS:
        return replace(plan, processes=1, cold_starts=0, end_to_end_seconds=0.0, batch_seconds=0.0)
    return plan


def _choose_images(job: Job) -> Images:
    """Return encoded test images of the data; synthetic ones if it has no image files."""
    contents = []
    for image in job.data.split("test")[:INPUTS]:
        content = image.read()
        if isinstance(content, bytes):
            try:
                decode_image(content)
            except ImageError:  # counted where accuracy was measured
                continue
            contents.append(content)
    if contents:
        return Images(contents, f"{len(contents)} test images")
    return synthesize_images(job.options.seed)


def _int8(job: Job) -> dict[str, Path]:
    """The int8 file, if there is one and this machine can time it; what cannot be timed is said."""
    searches = [Int8Search.model_validate(one) for one in job.folder.facts()["int8"]]
    for one in searches:
        if one.file is not None and one.not_timed is not None:
            job.display.note(f"{one.file} is {one.not_timed}")
    first = searches[0]
    return {} if first.file is None or first.not_timed is not None else {"student_int8": Path(first.file)}


def _export_teacher(job: Job, t: int) -> tuple[Path, int]:
    """The teacher as ONNX, for the bench alone, and its size in bytes with external data, if any."""
    member = job.teachers[t]
    file = FOLDER / ("teacher.onnx" if len(job.teachers) == 1 else f"teacher.{t}.onnx")
    network = trained_network(job, member)
    path = job.folder.path / file
    path.parent.mkdir(exist_ok=True)
    preprocessing = job.preprocessing(member)
    written = export_onnx(
        network,
        path,
        member.image_size,
        metadata=metadata(preprocessing, job.data.classes if member.classes else (), origin(job)),
        output=OUTPUT if member.classes else "features",
    )
    pixels, _, _ = job.rendered("test", member)
    check_parity(network, path, torch.from_numpy(normalise(pixels[:8].numpy(), preprocessing)))
    return file, written.bytes


def _subject(job: Job, name: str, file: Path, member: NetworkSpec, *, pixels: bool = False) -> Subject:
    rendered, _, _ = job.rendered("test", member)
    inputs = repeat_shifted(rendered[:INPUTS].numpy(), INPUTS)
    if not pixels:
        inputs = normalise(inputs, job.preprocessing(member))
    path = job.folder.path / file
    beside = path.with_name(f"{path.name}.data")
    return Subject(
        TimedFile(
            name=name,
            key=name,
            file=file.as_posix(),
            sha256=sha256(path),
            bytes=sum(one.stat().st_size for one in (path, beside) if one.exists()),
            runtime="onnxruntime",
            input=f"{inputs.dtype} [1, {', '.join(map(str, inputs.shape[1:]))}]",
            inputs=f"{min(INPUTS, len(rendered))} test images",
        ),
        path,
        inputs,
        any_batch=name.startswith("student"),
        classifies=member.classes > 0 and name.startswith("student"),
    )


def _facts(found: Bench, teachers: list[tuple[Path, int]]) -> dict[str, Any]:
    facts = bench_facts(found)
    of_teachers = [
        {"bytes": size, "file": file.as_posix(), **one}
        for (file, size), one in zip(teachers, facts["teachers"], strict=True)
    ]
    # An ensemble is as large as its members together; nobody has timed it as one.
    together = of_teachers[0] if len(teachers) == 1 else {"bytes": sum(size for _, size in teachers)}
    return {**facts, "teachers": of_teachers, "teacher": together}


def _line(found: Bench) -> str:
    parts = []
    for n in found.threads:
        p50 = [one.p50 for one in found.latencies if one.threads == n]
        told = " / ".join(f"{one:.3g}" if one else "–" for one in p50)
        parts.append(f"{told} ms on {n} thread{'s' if n > 1 else ''}")
    subjects = " / ".join(one.name.replace("_", " ") for one in found.subjects)
    return f"p50 of {subjects}: {'; '.join(parts)}"
