"""Recovery: placeholder."""

from ..export.search import Learned
from .job import Job


def recovered(job: Job) -> Learned:
    raise NotImplementedError
