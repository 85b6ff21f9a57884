"""prepare: what the methods need of the teachers before training, in one pass over the training images."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ...models.weights import classifier_weight
from .. import methods
from ..data.dataset import Split
from ..data.views import FIXED_SEED
from ..evaluation.inference import batches
from ..methods.base import Method, Parameters, PrepareContext, Features
from ..runs.device import inference_engine, use_threads
from ..runs.files import atomic_write, digest
from ..runs.folder import StageResult
from ..training.job import Job
from ..training.task import Teacher
from ..training.weights import load_teacher, trained_network, weights_digest

SCRATCH = "scratch"


def run(job: Job) -> StageResult:
    chosen = methods.parse_methods(job.options.method)
    parameters = methods.parse_parameters(chosen, job.options.settings)
    preparing = [(name, methods.load(name)) for name in chosen if methods.load(name).prepares]
    if not preparing:
        return StageResult("nothing to prepare" if chosen else "no method, nothing to prepare")
    # What a killed run has left there would never be missed.
    scratch = job.folder.path / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        return _prepare(job, preparing, parameters, _preparation(job, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(
    job: Job,
    preparing: Sequence[tuple[str, type[Method]]],
    parameters: Mapping[str, Parameters],
    preparation: PrepareContext,
) -> StageResult:
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    lines = []
    for name, method in preparing:
        prepared = method.prepare(parameters[name], preparation)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in prepared.tensors.items()}
        facts |= prepared.facts
        lines.append(prepared.summary)
    with atomic_write(job.folder.path / job.prepared) as part:
        save_file(tensors, part, {"key": job.key})
    return StageResult("; ".join(lines), [job.prepared], facts)


def _preparation(job: Job, scratch: Path) -> PrepareContext:
    use_threads(inference_engine(job.device, "fp32").threads)
    current_teachers = job.current_teachers

    @lru_cache(maxsize=1)
    def teacher(t: int) -> Teacher:
        return load_teacher(job, current_teachers[t], inference_engine(job.device, "fp32"))

    def features(t: int, reads: frozenset[str]) -> Iterator[Features]:
        for first, batch in job.rendered_batches("train", current_teachers[t]):
            yield teacher(t)(batch, reads)
            job.stage.update(
                f"reading {current_teachers[t].name}", first + len(batch), len(job.train.images), "images"
            )

    def sample(t: int, reads: frozenset[str], limit: int) -> Iterator[tuple[np.ndarray, Features]]:
        role: Split = "val" if job.data.split("val") else "train"
        pixels, _, _ = job.rendered(role, current_teachers[t], limit)
        for first, batch in batches(pixels, job.device):
            yield pixels[first : first + len(batch)].numpy(), teacher(t)(batch, reads)

    def cached(t: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        whole_key = digest(
            {
                **key,
                "teacher": weights_digest(job, current_teachers[t]),
                "data": job.data.fingerprint,
                "geometry": job.preprocessing(current_teachers[t]).to_dict(),
            }
        )
        return job.cache.get(kind, whole_key) or job.cache.put(kind, whole_key, write)

    return PrepareContext(
        student=job.shapes(job.student),
        teachers=[job.shapes(teacher) for teacher in current_teachers],
        teacher_names=[teacher.name for teacher in current_teachers],
        images=len(job.train.images),
        features=features,
        classifier=lambda t: classifier_weight(trained_network(job, current_teachers[t])),
        cached=cached,
        scratch=scratch,
        # Words belong to the teacher and not to a run: else no run could use another's stored answers.
        seed=FIXED_SEED,
        note=job.display.note,
        sample=sample,
    )
