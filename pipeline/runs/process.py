"""Signals, the time limit, the rank and the allocator of this process, without torch.

A request to stop (Ctrl-C, a scheduler's SIGTERM or --time-limit) raises KeyboardInterrupt at once. What was
being made is made again by the next run. Training defers the first request to the end of the step, to save
its position in the epoch. A second request is not deferred.
"""

import ctypes
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

TIME_LIMIT_EXIT = 75
"""Exit code after --time-limit: EX_TEMPFAIL of sysexits.h."""

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time are one: a scheduler and torchrun both signal the processes."""

RENDEZVOUS_TIMEOUT = timedelta(seconds=10)

ALLOCATOR = "QUESTPRESS_ALLOCATOR"
"""Environment variable; ``system`` leaves the settings of glibc's allocator as they are."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 1 << 30
OLD_KEPT_BYTES = 32 << 20
"""The largest threshold that versions of glibc before 2.35 accept."""

SPIN_COUNT = "4000"

_stores: list[Any] = []


class TimeLimit(KeyboardInterrupt):
    """The --time-limit is reached."""


REQUESTS: tuple[type[KeyboardInterrupt] | None, ...] = (None, KeyboardInterrupt, TimeLimit)
"""Requests by number, exchanged between ranks; the larger one wins."""


class Stop:
    """The request to stop this process.

    Signals reach the main thread only. In other threads, only the time limit works, and only in training.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self.requested: type[KeyboardInterrupt] | None = None
        self._deferring = False
        self._handles_signals = False
        self._expired = False
        self._last_signal = -math.inf

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Treat SIGTERM as Ctrl-C during the block.

        Jobs in several threads wait for each other: signals, torch's random numbers and its threads belong to
        the process, and a job that shared them would not be reproducible.
        """
        with self._lock:
            self._reset()
            handlers: dict[signal.Signals, Any] = {}
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    # Shells make background jobs ignore Ctrl-C.
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        handlers[number] = signal.signal(number, self._on_signal)
            self._handles_signals = signal.SIGTERM in handlers
            try:
                yield
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def limit_time(self, seconds: float | None) -> Iterator[None]:
        """Stop the block after a number of seconds, or never if it is None."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def defer(self) -> Iterator[None]:
        """During the block, let a first request only set ``requested``."""
        if self._expired and not self._handles_signals:
            self.requested = TimeLimit
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @property
    def request(self) -> int:
        """The request as an index of ``REQUESTS``."""
        return REQUESTS.index(self.requested)

    def take(self, request: int) -> KeyboardInterrupt:
        """Return a request, of this process or another, as an exception, and reset ``requested``."""
        self.requested = None
        return (REQUESTS[request] or KeyboardInterrupt)()

    def _expire(self) -> None:
        self._expired = True
        if not self._handles_signals:
            if self._deferring:
                self.requested = TimeLimit
        elif hasattr(signal, "pthread_kill"):
            # A real signal also interrupts the main thread while it waits for another process.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # type: ignore[arg-type]
        else:
            import _thread

            _thread.interrupt_main(signal.SIGTERM)

    def _on_signal(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last_signal < SAME_SIGNAL_SECONDS:
            return
        self._last_signal = now
        kind = TimeLimit if self._expired else KeyboardInterrupt
        if self._deferring and self.requested is None:
            self.requested = kind
            return
        raise kind


STOP = Stop()


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning each large block to the system.

    Otherwise every large tensor of a training step is mapped and cleared by the kernel again, page by page
    (benchmarks/training/allocator.py). Other systems and allocators are left as they are.
    """
    if os.environ.get(ALLOCATOR) == "system" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if not libc.mallopt(name, KEPT_BYTES):
            libc.mallopt(name, OLD_KEPT_BYTES)


def return_freed_memory() -> None:
    """Return memory that glibc has kept to the system, at the end of a stage."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def limit_spinning() -> None:
    """Let a thread of torch that waits for others sleep after a seventy-fifth of the default time.

    A thread that spins uses up its time on a core that another program needs too, and the others wait until
    it gets the core back (benchmarks/training/neighbor.py). Other values set by the user are kept. GNU's
    OpenMP reads the variable when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _read_rank() -> tuple[int, int]:
    """Return rank and number of processes; 0 and 1 unless the environment has both, as torchrun sets them."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, count) if 0 <= rank < count else (0, 1)


def is_single_process() -> bool:
    """Return True if this process was not started by torchrun with others."""
    return _read_rank()[1] == 1


def count_local_processes() -> int:
    """Return the number of the job's processes on this machine."""
    try:
        count = int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return 1
    return min(max(1, count), _read_rank()[1])


def describe_ignored_variables() -> str | None:
    """Return the variables of torchrun that are set without effect, such as by a cluster, with advice."""
    values = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if os.environ.get(name)}
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if not is_single_process() or all(values[name] == single[name] for name in values):
        return None
    names = " and ".join(f"{name}={value}" for name, value in values.items())
    return (
        f"{names} {'is' if len(values) == 1 else 'are'} ignored: several processes require RANK from 0 to "
        "WORLD_SIZE - 1. This is one process. Unset them, or start several: "
        "torchrun --nproc-per-node 2 --no-python compress …"
    )


def is_main() -> bool:
    """Return True on rank 0, which prints the output."""
    return _read_rank()[0] == 0


def count_restarts() -> int:
    """Return how often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def connect() -> None:
    """Open a connection to the rendezvous store, whose process may exit before this one."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _stores.append(TCPStore(host, port, is_master=False, timeout=RENDEZVOUS_TIMEOUT))


@cache
def is_first_to_exit() -> bool:
    """Return True on the first process that exits early, which reports the error."""
    if is_single_process():
        return True
    try:
        return int(_stores[-1].add(f"questpress exits {count_restarts()}", 1)) == 1
    except (IndexError, RuntimeError):  # not connected, or the store's process has exited
        return is_main()
