"""Batches made one step ahead of their use, and copies that nothing waits for."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Iterable[Tensor])


def one_ahead(batches: Iterator[T], device: torch.device | str) -> Iterator[T]:
    """The same batches, iterables of their tensors. On an NVIDIA GPU each is made, on a stream of its own,
    while the one before it is worked on; elsewhere each is made when it is asked for.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))  # what the batches are made from is there by then

    def made() -> T | None:
        with torch.cuda.stream(beside):
            return next(batches, None)

    coming = made()
    while coming is not None:
        here = torch.cuda.current_stream(device)
        here.wait_stream(beside)
        for tensor in coming:
            tensor.record_stream(here)  # its memory is not used again before this stream is done with it
        # Begun before the step that uses `ready`, so that the two run side by side.
        ready, coming = coming, made()
        yield ready


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device; with CUDA by way of pinned memory, from which a copy waits for
    nothing and is not waited for.
    """
    device = torch.device(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # On Apple's GPUs such a copy may outlive the memory it reads.
    return tensor.to(device, non_blocking=device.type != "mps")
