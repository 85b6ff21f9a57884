"""The processes of one job: one alone, or several under torchrun, each with a device of its own.

Rank 0 writes the run folder and speaks; the others train with it and leave before the export. All of them see
one run folder and one cache: on several machines both lie on a file system that they share.
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

from ...config.options import Options
from ...errors import UsageError
from ...runs import main_process

PATIENCE = timedelta(days=7)
"""How long a rank waits for another, which may be learning a vocabulary; torchrun ends those left alone."""


class Ranks:
    """This process among its job's."""

    def __init__(self, number: int = 0, count: int = 1, local: int = 0) -> None:
        self.number = number
        """From 0; 0 leads."""
        self.count = count
        self.local = local
        """Among the processes of this machine."""

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def wait(self) -> None:
        """Go on when all ranks are here."""
        if self.count > 1:
            dist.barrier(group=_host_group())

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_host_group())
        return box[0]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all ranks' values, on every rank."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def most(self, numbers: list[int]) -> list[int]:
        """The largest that a rank says in each place, on every rank's host."""
        if self.count == 1:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group())
        return [int(one) for one in largest]

    def of_lead(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums that count once: rank 0's as they are, and zeros on the others."""
        return sums if self.is_main else {name: torch.zeros_like(value) for name, value in sums.items()}

    def gather(self, part: Tensor) -> Tensor:
        """All ranks' parts [n_r,…], of any lengths, one after the other, on every rank's host."""
        if self.count == 1:
            return part.cpu()
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part.cpu(), group=_host_group())
        # A rank that had nothing to do knows no widths either.
        return torch.cat([one for one in parts if len(one)] or parts)

    def mine(self, n: int) -> slice:
        """This rank's part of n things: one after the other, as even as can be."""
        return slice(n * self.number // self.count, n * (self.number + 1) // self.count)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block, first by rank 0 alone (to fetch or make what all need) and then by the others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def join() -> Ranks:
    """This process's place: as torchrun tells it, or alone.

    Raises:
        UsageError: torchrun's processes cannot find one another.
    """
    if main_process.alone():
        return Ranks()
    count = int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
            main_process.meet()
        except (KeyError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"The {count} processes could not find one another ({error}); start them with torchrun, as "
                "in torchrun --nproc-per-node 2 --no-python compress …"
            ) from error
    _host["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    if not ranks.is_main:  # what rank 0 says once is enough
        warnings.simplefilter("ignore")
        logging.getLogger("questpress").setLevel(logging.ERROR)
    return ranks


def check_ranks(options: Options, ranks: Ranks, images: int, device: str) -> None:
    """
    Raises:
        UsageError: so many ranks cannot share a step evenly, or each has too little of it.
    """
    if options.sync_bn and (ranks.count == 1 or not device.startswith("cuda")):
        raise UsageError("--sync-bn is for several GPUs: start the command with torchrun, or leave it out.")
    if ranks.count == 1:
        return
    if options.device and ":" in options.device:
        raise UsageError(
            f"--device {options.device}: each of the {ranks.count} processes has a GPU of its own; say "
            f"--device {options.device.partition(':')[0]}."
        )
    if device == "mps":
        raise UsageError("Several processes cannot share this machine's GPU: start one, or say --device cpu.")
    assert options.batch_size is not None
    batch = min(options.batch_size, images)
    if batch % ranks.count or batch // ranks.count < 2:
        even = max(2, round(batch / ranks.count)) * ranks.count
        if even > images:
            raise UsageError(f"{images} training images are too few for {ranks.count} processes.")
        raise UsageError(
            f"--batch-size {batch} cannot be shared evenly by {ranks.count} processes, two images each at "
            f"least; say --batch-size {even}."
        )


def leave() -> None:
    """End what ``join`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _host.clear()


_host: dict[str, Any] = {}


def _host_group() -> Any:
    """A group over gloo, whose waiting costs no GPU anything."""
    return _host["group"]
