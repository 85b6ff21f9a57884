"""The processes of a job: a single one, or several under torchrun, each with its own device.

Rank 0, the main process, writes the run folder and logs. The others take part in training and leave before
the export. All of them see one run folder and one cache: on several machines, both are on a shared file
system.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.options import Options
from ..errors import UsageError
from ..runs import process

TIMEOUT = timedelta(days=7)
"""A rank may wait for another that clusters a vocabulary. torchrun ends ranks whose peers died."""

_groups: dict[str, Any] = {}
"""``host``: the gloo group, in which waiting does not block a GPU."""


class Ranks:
    """This process among those of its job."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count = rank, count
        self.local_rank = local_rank
        """Rank on this machine."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier(group=_groups["host"])

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_groups["host"])
        return box[0]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def max(self, numbers: list[int]) -> list[int]:
        """Return the maximum over all ranks of each number, on the host."""
        if self.count == 1:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_groups["host"])
        return largest.tolist()

    def keep_on_main(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return sums of all ranks on rank 0 and zeros on the others, so that they count once."""
        return sums if self.is_main else {name: torch.zeros_like(value) for name, value in sums.items()}

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the parts [n_r,…] of all ranks, of any lengths, on the host."""
        if self.count == 1:
            return part.cpu()
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part.cpu(), group=_groups["host"])
        # The empty part of a rank without work may lack the other dimensions.
        return torch.cat([part for part in parts if len(part)] or parts)

    def part(self, n: int) -> slice:
        """Return this rank's consecutive part of n items."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 (which downloads or caches), then on the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def join() -> Ranks:
    """Join the process group of torchrun, if there is one."""
    if process.is_single_process():
        return Ranks()
    count = int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
            process.connect()
        except (KeyError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"The {count} processes could not connect ({error}). Start them with torchrun: "
                "torchrun --nproc-per-node 2 --no-python compress …"
            ) from error
    _groups["host"] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    if not ranks.is_main:
        warnings.simplefilter("ignore")
        logging.getLogger("questpress").setLevel(logging.ERROR)
    return ranks


def check_ranks(options: Options, ranks: Ranks, images: int, device: str) -> None:
    """Raise UsageError unless the options fit the number of processes."""
    if options.sync_bn and (ranks.count == 1 or not device.startswith("cuda")):
        raise UsageError("--sync-bn requires several GPUs. Start the command with torchrun, or omit it.")
    if ranks.count == 1:
        return
    if options.device and ":" in options.device:
        raise UsageError(
            f"--device {options.device}: each of the {ranks.count} processes uses its own GPU. Use "
            f"--device {options.device.partition(':')[0]}."
        )
    if device == "mps":
        raise UsageError("--device mps does not support several processes. Start one, or use --device cpu.")
    assert options.batch_size is not None
    batch = min(options.batch_size, images)
    if batch % ranks.count or batch // ranks.count < 2:
        even = max(2, round(batch / ranks.count)) * ranks.count
        if even > images:
            raise UsageError(f"{images} training images are too few for {ranks.count} processes.")
        raise UsageError(
            f"--batch-size {batch} must be a multiple of {ranks.count} processes, with at least two images "
            f"each. Use --batch-size {even}."
        )


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _groups.clear()
