"""How much memory a training takes at most."""

import sys

import torch


def peak_memory(device: str) -> int | None:
    """Bytes at most in use: by tensors on a GPU since :func:`forget_peak`, else by this process so far.

    None where the system does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # Linux counts in KiB


def forget_peak(device: str) -> None:
    """Let a GPU's peak be that of what comes; a process cannot forget its own."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
