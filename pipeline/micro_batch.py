"""How many images of a step a device holds at once: fewer, when memory runs out, with the same gradients."""

from collections.abc import Callable

import torch

from .errors import JobError
from .out_of_memory import out_of_memory
from .plan import Plan
from .training.job import Job

SMALLEST = 2
"""BatchNorm needs two."""


class MicroBatch:
    """The size, as asked for or as found; what was found is recorded, so that a resumed run repeats it."""

    def __init__(self, job: Job, what: str, plan: Plan) -> None:
        self.job, self.what, self.plan = job, what, plan
        self.share = plan.batch_size // job.ranks.count
        recorded = job.folder.record.get("micro_batches", {}).get(what)
        found = recorded["size"] if recorded and recorded["key"] == job.key else None
        self.size: int | None = found or plan.micro_batch

    def fits(self, train: Callable[[int | None], None]) -> bool:
        """Train in parts of this size; where memory runs out, halve it and answer False.

        Raises:
            JobError: there is no memory for the smallest part.
        """
        try:
            train(self.size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            self._halve()
        else:
            return True
        # Here nothing of the failed step is referred to any more.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _halve(self) -> None:
        before = min(self.size or self.share, self.share)
        size = max(SMALLEST, before // 2)
        if self.job.ranks.count > 1:
            raise JobError(
                f"Rank {self.job.ranks.number} has no memory on {self.job.device} for {before} images of a "
                f"step; --micro-batch {size} keeps the step and computes it in parts."
            )
        if size >= before:
            raise JobError(
                f"{self.job.device} has no memory for {before} images at once; take a smaller network or "
                "--image-size, or free its memory."
            )
        self.size = size
        self.job.folder.record.setdefault("micro_batches", {})[self.what] = {
            "key": self.job.key,
            "size": size,
        }
        self.job.folder.save()
        self.job.display.warn(
            f"no memory for {before} images at once: each step of {self.plan.batch_size} is taken in parts "
            f"of {size} (its gradients are the same; BatchNorm's statistics are those of the parts)"
        )
