"""bench: latency of teacher and student, each file in its own process on this machine."""

from pathlib import Path
from typing import Any

import numpy as np

from ...export import bench as latency
from ...export.onnx_export import OUTPUT, check_parity, export_onnx
from ...export.runtime import allowed_cores, metadata, normalise
from ..files import whole
from ..int8_results import Int8Search
from ..job import Job, Member, takes_pixels
from ..run_folder import Done
from ..trained import trained_network
from .export import STUDENT_ONNX, origin

FOLDER = Path("bench")
SAMPLES = FOLDER / "latency.npz"
INPUTS = 64
"""Different images that a subject sees in turn."""

MOST_THREADS = 4


def run(job: Job) -> Done:
    teachers = [_export_teacher(job, t) for t in range(len(job.teachers))]
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {t}" for t in range(len(teachers))]
    files = dict(zip(names, [file for file, _ in teachers], strict=True))
    own = {"student": STUDENT_ONNX} | _int8(job)
    subjects = [
        *(_subject(job, name, file, job.teachers[t]) for t, (name, file) in enumerate(files.items())),
        *(_subject(job, name, file, job.student, pixels=takes_pixels(job)) for name, file in own.items()),
    ]
    threads = sorted({1, min(allowed_cores(), MOST_THREADS)})
    result = latency.bench(
        subjects,
        threads=threads,
        seconds=job.options.bench_seconds,
        seed=job.options.seed,
        progress=lambda share, what: job.stage.update("timing", share, 1.0, more=what),
    )
    samples: dict[str, Any] = {}
    for one in result.latencies:
        samples[f"{one.subject}.{one.threads}.ms"] = one.samples
        samples[f"{one.subject}.{one.threads}.round"] = one.rounds
    with whole(job.folder.path / SAMPLES) as part, part.open("wb") as file:
        np.savez_compressed(file, **samples)
    unsettled = [one for one in result.latencies if not one.settled]
    if unsettled:
        named = ", ".join(f"{one.subject} on {one.threads} threads" for one in unsettled)
        job.display.warn(f"This machine was restless: the warm-up of {named} did not settle within 2 %.")
    # Of a teacher beyond 2 GB, the weights lie beside the graph.
    beside = [file.with_name(f"{file.name}.data") for file in files.values()]
    weights = [file for file in beside if (job.folder.path / file).exists()]
    outputs = [file.as_posix() for file in (SAMPLES, *files.values(), *weights)]
    return Done(_line(result, threads), outputs, _facts(result, threads, names, teachers))


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
    import torch

    pixels, _, _ = job.rendered("test", member)
    check_parity(network, path, torch.from_numpy(normalise(pixels[:8].numpy(), preprocessing)))
    return file, written.bytes


def _subject(job: Job, name: str, file: Path, member: Member, *, pixels: bool = False) -> latency.Subject:
    rendered, _, _ = job.rendered("test", member)
    inputs = rendered[:INPUTS].numpy()
    if not pixels:
        inputs = normalise(inputs, job.preprocessing(member))
    return latency.Subject(name, job.folder.path / file, inputs)


def _facts(
    result: latency.BenchResult,
    threads: list[int],
    names: list[str],
    teachers: list[tuple[Path, int]],
) -> dict[str, Any]:
    def measured(subject: str) -> dict[str, Any]:
        found = {str(n): result.latency(subject, n) for n in threads}
        return {
            n: {"p50": one.p50, "p90": one.p90, "p95": one.p95, "p99": one.p99, "mean": one.mean, "n": one.n}
            for n, one in found.items()
        }

    def speedups(subject: str, baselines: list[str]) -> list[dict[str, Any]]:
        return [
            {"over": base, "threads": n, "ratio": one.ratio, "low": one.low, "high": one.high}
            for base in baselines
            for n in threads
            for one in [result.speedup(subject, base, n)]
        ]

    of_teachers = [
        {"bytes": size, "file": file.as_posix(), "latency_ms": measured(name)}
        for name, (file, size) in zip(names, teachers, strict=True)
    ]
    # An ensemble is as large as its members together; nobody has timed it as one.
    together = of_teachers[0] if len(teachers) == 1 else {"bytes": sum(size for _, size in teachers)}
    machine = result.environment
    of_int8 = {}
    if any(one.subject == "student_int8" for one in result.latencies):
        of_int8["student_int8"] = {
            "latency_ms": measured("student_int8"),
            "speedups": speedups("student_int8", [*names, "student"]),
        }
    return {
        "teachers": of_teachers,
        "teacher": together,
        "student": {"latency_ms": measured("student"), "speedups": speedups("student", names)},
        **of_int8,
        "environment": {
            "cpu": machine.cpu,
            "machine": machine.machine,
            "instruction sets": ", ".join(machine.flags),
            "cores allowed": str(machine.cores),
            "load when timing began": "" if machine.load is None else f"{machine.load:.2f}",
        },
    }


def _line(result: latency.BenchResult, threads: list[int]) -> str:
    parts = []
    for n in threads:
        p50 = [f"{one.p50:.3g}" if one.p50 else "–" for one in result.latencies if one.threads == n]
        parts.append(f"{' / '.join(p50)} ms on {n} thread{'s' if n > 1 else ''}")
    subjects = " / ".join(dict.fromkeys(one.subject.replace("_", " ") for one in result.latencies))
    return f"p50 of {subjects}: {'; '.join(parts)}"
