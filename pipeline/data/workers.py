"""Work on images in processes of their own, ahead of its use and in its order: torch's DataLoader.

A task is a small picklable object that holds all it needs, and a worker holds nothing: what comes out is the
same however many workers there are.
"""

import atexit
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import resource_tracker
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...export.runtime import allowed_cores
from ..errors import JobError, QuestpressError

PREFETCH = 2
"""Tasks that each worker has at hand: the one it does and the next one."""

Task = Callable[[], Any]
"""Gives a contiguous tensor or a small object."""

_INSTEAD = "--resident host does without workers."


def worker_count(device: str) -> int:
    """Workers for a job on ``device``, of the cores that this process (this rank) may use.

    The thread that feeds a GPU keeps a core for itself. On a CPU training has them all, and workers take half
    as many, at a low priority.
    """
    cores = allowed_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores - 1 if torch.device(device).type == "cuda" else cores // 2)


class Workers:
    """``count`` processes that do one list of tasks at a time, started when there is something to do.

    ``device`` is where results will go: for a GPU of NVIDIA's, tensors come in pinned memory.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.count = count
        self.device = torch.device(device)
        self._given = _Given()
        self._loader: DataLoader[Any] | None = None
        self._turn = 0

    def map(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """The tasks' results, in their order. A new call ends the one before it.

        Raises:
            JobError: a task raised it, or a worker died.
        """
        self._turn += 1
        turn, waiting = self._turn, iter(tasks)
        first = next(waiting, None)
        if first is None:
            return
        with self._told():
            results = self._begin(itertools.chain([first], waiting))
        while True:
            if turn != self._turn:
                raise RuntimeError("these workers were given other tasks in the meantime")
            with self._told():
                result = next(results, _END)
            if result is _END:
                return
            if isinstance(result, _Failed):
                raise JobError(result.sentence)
            if isinstance(result, np.ndarray):
                result = torch.from_numpy(result)
            yield result

    @property
    def processes(self) -> list[Any]:
        """Those that run now."""
        iterator = getattr(self._loader, "_iterator", None)
        return [] if iterator is None else list(iterator._workers)

    def close(self) -> None:
        """End the processes at once, since they hold nothing; ``map`` starts new ones."""
        self._turn += 1
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            for process in iterator._workers:
                process.kill()
            iterator._shutdown_workers()  # torch has no public name for it

    def __del__(self) -> None:
        self.close()

    def _begin(self, tasks: Iterator[Task]) -> Iterator[Any]:
        self._given.tasks = tasks
        if self._loader is not None:
            return iter(self._loader)
        cuda = self.device.type == "cuda"
        self._loader = DataLoader(
            _Doing(),
            batch_size=None,
            sampler=self._given,
            num_workers=self.count,
            collate_fn=_unchanged,
            pin_memory=cuda,
            worker_init_fn=partial(_settle, low_priority=not cuda),
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # else it would draw from the one that training draws from
            prefetch_factor=PREFETCH,
            persistent_workers=True,
        )
        # The thread that pins memory works on the device that is current as it starts.
        with _started_quietly(), torch.cuda.device(self.device) if cuda else nullcontext():
            results = iter(self._loader)
        _running.add(self)
        # Last registered, first called: while multiprocessing can still be used.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        return results

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What torch says of dead workers, in a sentence for people."""
        try:
            yield
        except RuntimeError as error:
            explained = self._explained(error)
            self.close()
            if explained is None:
                raise
            raise explained from error

    def _explained(self, error: RuntimeError) -> JobError | None:
        """What went wrong with the workers themselves; None where a task raised the error."""
        if "in DataLoader worker process" in str(error):
            return None
        codes = {process.exitcode for process in self.processes} - {None, 0}
        if -getattr(signal, "SIGBUS", 0) in codes:
            why = "had no room in shared memory; give the container more of it (docker run --shm-size=8g)."
        elif -getattr(signal, "SIGKILL", 0) in codes:
            why = "was killed, most likely for want of memory; lower --batch-size or give the job more."
        elif codes:
            why = f"ended (exit code {min(codes)}); what it wrote above tells why."
        elif "open files" in str(error):
            why = "needs more open files than are allowed; raise the limit with ulimit -n 65536."
        else:
            return None
        return JobError(f"A process that decodes images {why} {_INSTEAD}")


_END = object()
_running: "WeakSet[Workers]" = WeakSet()


def _close_all() -> None:
    for workers in list(_running):
        workers.close()


class _Given:
    """The tasks of the latest call, as DataLoader's sampler."""

    tasks: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.tasks


class _Failed:
    """What is told in one sentence, on its way from a worker."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence


class _Doing(Dataset[Any]):
    def __getitem__(self, task: Task) -> Any:
        try:
            result = task()
        except QuestpressError as error:
            return _Failed(str(error))
        return in_shared_memory(result) if isinstance(result, Tensor) else result


def in_shared_memory(tensor: Tensor) -> Tensor | np.ndarray:
    """The tensor where another process need not copy it from; an array, which is sent through a pipe, where
    shared memory is full (a container often has 64 MB of it).
    """
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error) and "No space left" not in str(error):
            raise
        array: np.ndarray = tensor.numpy()
        return array


def _unchanged(result: Any) -> Any:
    return result


def _settle(_: int, low_priority: bool) -> None:
    """Begin as a worker: one that ends when the process it works for ends, however that comes about. (Torch's
    own watch is on the process that a worker was forked from.)
    """
    _block_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if low_priority and hasattr(os, "nice"):
        os.nice(10)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _context() -> multiprocessing.context.BaseContext:
    """Processes that inherit neither threads nor a GPU, forked from one that has imported this module."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.streaming"])
    return context


@contextmanager
def _started_quietly() -> Iterator[None]:
    """Processes started in this block leave Ctrl-C and SIGTERM, which a whole group of processes gets, to
    this one, which ends them; and they don't run the main script again, as Python's would, guarded by
    ``if __name__ == "__main__"`` or not: nothing that they need is defined there.
    """
    resource_tracker.ensure_running()  # it would lift the block
    before = _block_signals()
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _block_signals() -> set[Any] | None:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return None
    return signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
