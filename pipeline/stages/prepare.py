"""prepare: compute what the methods need of the teachers, in one pass over the training images."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ...models.checkpoint import tensors_digest
from ...models.weights import classifier_weight
from .. import methods
from ..data.dataset import Split
from ..data.training_data import TrainingData
from ..data.views import FIXED_SEED
from ..evaluation.inference import batches
from ..methods.base import Features, PrepareContext
from ..runs.device import inference_engine, use_threads
from ..runs.files import atomic_write
from ..runs.folder import StageResult
from ..runs.hashes import digest
from ..training.context import RunContext
from ..training.student import method_setup
from ..training.task import Teacher
from ..training.weights import load_network, load_teacher

SCRATCH = "scratch"


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    o = context.options
    names = methods.parse_methods(o.method)
    parameters = methods.parse_parameters(names, o.settings)
    classes = {name: methods.load(name) for name in names}
    classes = {name: method for name, method in classes.items() if method.prepares}
    if not classes:
        return StageResult("nothing to prepare" if names else "no method, nothing to prepare")
    scratch = context.folder.path / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # files of a killed run
    scratch.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    summaries = []
    try:
        prepare_context = _prepare_context(context, data, scratch)
        for name, method in classes.items():
            result = method.prepare(parameters[name], prepare_context)
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in result.tensors.items()}
            facts |= result.facts
            summaries.append(result.summary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    file = context.round.prepared
    with atomic_write(context.folder.path / file) as part:
        save_file(tensors, part, {"key": context.key})
    return StageResult("; ".join(summaries), [file], facts)


def _prepare_context(context: RunContext, data: TrainingData, scratch: Path) -> PrepareContext:
    engine = inference_engine(context.device, "fp32")
    use_threads(engine.threads)
    run, specs = context.folder.path, context.round.teachers
    images = len(data.train.images)

    @lru_cache(maxsize=1)
    def teacher(t: int) -> Teacher:
        return load_teacher(run, specs[t], engine)

    def features(t: int, reads: frozenset[str]) -> Iterator[Features]:
        for first, batch in data.rendered_train(specs[t]):
            yield teacher(t)(batch, reads)
            context.progress.update(
                f"teacher {specs[t].name}: computing features", first + len(batch), images, "images"
            )

    def sample(t: int, reads: frozenset[str], limit: int) -> Iterator[tuple[np.ndarray, Features]]:
        split: Split = "val" if data.dataset.val else "train"
        pixels, _, _ = data.rendered(split, specs[t], limit)
        for first, batch in batches(pixels, context.device):
            yield pixels[first : first + len(batch)].numpy(), teacher(t)(batch, reads)

    def cached(t: int, kind: str, key: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        full_key = digest(
            {
                **key,
                "teacher": tensors_digest(run / specs[t].file),
                "data": data.dataset.fingerprint,
                "geometry": specs[t].preprocessing.to_dict(),
            }
        )
        return context.cache.get(kind, full_key) or context.cache.put(kind, full_key, write)

    setup = method_setup(context.round)
    return PrepareContext(
        student=setup.student,
        teachers=setup.teachers,
        teacher_names=[spec.name for spec in specs],
        images=images,
        features=features,
        classifier=lambda t: classifier_weight(load_network(run, specs[t])),
        cached=cached,
        scratch=scratch,
        # Not the run's seed: cached teacher outputs depend on the vocabulary, and all runs share them.
        seed=FIXED_SEED,
        note=context.display.note,
        sample=sample,
    )
