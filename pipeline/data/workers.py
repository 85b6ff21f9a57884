"""Worker processes that decode images ahead of their use: torch's DataLoader over a stream of tasks.

A task is a small picklable callable with everything it needs, so results do not depend on the number of
workers.
"""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...export.runtime import allowed_cores
from ..errors import JobError, QuestpressError
from ..runs.process import count_local_processes, keep_freed_memory

Task = Callable[[], Any]
"""Returns a contiguous tensor or a small object."""


def worker_count(device: str) -> int:
    """Return the number of workers for a run on ``device``, from the cores available to this rank.

    The thread that feeds a GPU keeps one core. On a CPU, training uses all cores, and half as many workers
    run at low priority.
    """
    cores = allowed_cores() // count_local_processes()
    return max(1, cores - 1 if torch.device(device).type == "cuda" else cores // 2)


class Workers:
    """``count`` processes for each list of tasks, started for it and ended with it.

    ``device`` is the destination of results: for an NVIDIA GPU, tensors are returned in pinned memory.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.count = count
        self.device = torch.device(device)
        self.processes: Sequence[Any] = ()
        """The processes of the last list of tasks."""

    def map(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """Yield the tasks' results in order.

        Raises:
            JobError: a task raised it, such as for an unreadable image, or a worker died.
        """
        cuda = self.device.type == "cuda"
        loader = DataLoader(
            _Executor(),
            batch_size=None,
            sampler=iter(tasks),  # read as workers become free
            num_workers=self.count,
            collate_fn=_identity,
            pin_memory=cuda,
            worker_init_fn=partial(_init_worker, low_priority=not cuda),
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # by default it draws from the generator that training uses
        )
        processes: Sequence[Any] = ()
        try:
            # The thread that pins memory uses the device that is current when it starts.
            with _isolated_start(), torch.cuda.device(self.device) if cuda else nullcontext():
                results: Any = iter(loader)
            # torch has no public names for this and for shutdown.
            processes = self.processes = results._workers
        except RuntimeError as error:
            raise _explain(error, processes) from error
        # At exit, before multiprocessing waits for the processes.
        kill = Finalize(None, _kill, (processes,), exitpriority=10)
        try:
            for result in results:
                if isinstance(result, JobError):
                    raise result
                yield torch.from_numpy(result) if isinstance(result, np.ndarray) else result
        except RuntimeError as error:
            raise _explain(error, processes) from error
        finally:
            kill()
            results._shutdown_workers()


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()


def _explain(error: RuntimeError, processes: Sequence[Any]) -> RuntimeError | JobError:
    """Return an error for a worker that died; an error that a task raised is returned as it is."""
    if "in DataLoader worker process" in str(error):
        return error
    codes = {process.exitcode for process in processes} - {None, 0}
    if -getattr(signal, "SIGBUS", 0) in codes:
        reason = "ran out of shared memory. Give the container more of it (docker run --shm-size=8g)"
    elif -getattr(signal, "SIGKILL", 0) in codes:
        reason = "was killed, probably because memory ran out. Lower --batch-size or provide more memory"
    elif codes:
        reason = f"ended with exit code {min(codes)}; its output is above. Repeat the command"
    elif "open files" in str(error):
        reason = "exceeded the limit of open files. Raise it with ulimit -n 65536"
    else:
        return error
    return JobError(f"A worker process {reason}, or use --resident host, which needs no workers.")


class _Executor(Dataset[Any]):
    def __getitem__(self, task: Task) -> Any:
        try:
            result = task()
        except QuestpressError as error:
            return JobError(str(error))
        return share_memory(result) if isinstance(result, Tensor) else result


def share_memory(tensor: Tensor) -> Tensor | np.ndarray:
    """Move a tensor to shared memory; return an array, which is sent through a pipe, if that is full.

    Containers often have 64 MB of shared memory.
    """
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error) and "No space left" not in str(error):
            raise
        array: np.ndarray = tensor.numpy()
        return array


def _identity(result: Any) -> Any:
    return result


def _init_worker(_: int, low_priority: bool) -> None:
    """Let a worker end with the main process; torch only watches the process that it was forked from."""
    _block_signals()
    keep_freed_memory()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if low_priority and hasattr(os, "nice"):
        os.nice(10)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _context() -> multiprocessing.context.BaseContext:
    """Return a context whose processes inherit neither threads nor a GPU, and start with torch imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.streaming"])
    return context


@contextmanager
def _isolated_start() -> Iterator[None]:
    """Start processes that ignore Ctrl-C and SIGTERM, and that do not run the main script again.

    A process group receives these signals together, and the main process ends the workers itself. A script
    without ``if __name__ == "__main__"`` would otherwise run again in each worker.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signals
    previous = _block_signals()
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if previous is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _block_signals() -> set[Any] | None:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return None
    return signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
