"""round k: a student that is the next one's teacher, with what its methods need to be prepared."""

from collections.abc import Sequence

from safetensors import safe_open

from ..runs.folder import StageResult
from ..training.job import Job
from . import prepare, student


def run(job: Job) -> StageResult:
    prepared = _prepared(job) if job.ranks.is_main else []
    job.ranks.wait()
    learned = student.run(job)
    # All else that is known of it is told of the student that ships.
    return StageResult(learned.summary, [*prepared, *learned.outputs], {"rounds": learned.facts["rounds"]})


def _prepared(job: Job) -> Sequence[str]:
    """The files that ``prepare`` leaves; a round that goes on has them already."""
    file = job.folder.path / job.prepared
    if file.exists():
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("key") == job.key:
                return [job.prepared]
    return prepare.run(job).outputs
