"""Choose the fastest engine of a training by timing some of its steps on a copy.

The fastest precision, memory layout and number of threads depend on processor, network and batch: bf16 gains
70 % on one network and loses half on another of the same machine (``docs/scale.md``). So the default
engine is compared with one variation after another, in alternating steps, and replaced if one is clearly
faster. Weights, statistics and random state stay untouched. The search takes at most ``TIME_FRACTION`` of the
training's time; a shorter training only compares all threads with one, by a step each.
"""

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from ...export.runtime import processor
from ..runs.device import Engine, bf16_pays, cores, use_threads
from ..runs.threads import thread_counts
from .task import DistillationTask

TIME_FRACTION = 0.02
"""Largest fraction of the training's time for the search, without compilation."""

MIN_SPEEDUP = 1.05
"""Speedup from which an engine replaces the current one."""

MIN_STEPS, MAX_STEPS = 3, 9
"""Timed steps of each engine in a comparison."""

SHORTEST = 4
"""Steps of the comparison of all threads with one: a warm-up and a timed step of each."""

HOPELESS = 2.0
"""A candidate this many times slower in the first step is given up. One this many times faster is taken after
``MIN_STEPS``, and in a short training after one step."""

COMPILE_FROM = {"cpu": 3600.0, "cuda": 600.0}
"""Seconds of training from which compilation, of about a minute, is tried."""

SMALL_STEP = 0.05
"""Seconds. A shorter step of a GPU may be dominated by kernel launches, so CUDA graphs are tried too."""


@dataclass(frozen=True)
class Trial:
    """The chosen engine, and the throughput of each engine that was timed in images/s."""

    engine: Engine
    throughput: Mapping[Engine, float] = field(default_factory=dict)

    def __str__(self) -> str:
        engines = sorted(self.throughput, key=lambda engine: engine != self.engine)
        return "; ".join(f"{engine}: {self.throughput[engine]:.0f} images/s" for engine in engines)


MakeOptimizer = Callable[[DistillationTask], torch.optim.Optimizer]
Variation = Callable[[Engine], Engine | None]


def find_fastest_engine(
    task: DistillationTask,
    batch: tuple[Any, ...],
    make_optimizer: MakeOptimizer,
    steps: int,
    *,
    precision: str,
    compile: str,
    note: Callable[[str], None],
    has_micro_batches: bool = False,
) -> Trial:
    """Find the fastest engine for ``steps`` training steps.

    Args:
        batch: arguments of the task.
        precision: ``auto``, or the precision set by the user.
        compile: ``auto``, ``on`` or ``off``.
        has_micro_batches: True excludes CUDA graphs, which accumulate wrong gradients (pytorch#169545).
    """
    default = task.engine
    kind = torch.device(default.device).type
    if _is_distributed():  # ranks have to use the same engine, and would choose different ones
        return Trial(replace(default, compile="default") if compile == "on" else default)
    variations: list[Variation] = [_vary_layout, *_vary_threads(default)] if kind == "cpu" else []
    if kind == "cpu" and precision == "auto":
        variations.insert(0, _vary_precision)
    compiles = compile == "on" or (compile == "auto" and kind in COMPILE_FROM and can_compile(kind))
    # Steps of the default engine alone and of a comparison, with a margin for slower ones.
    too_short = TIME_FRACTION * steps < 4 * (1 + MIN_STEPS)
    is_tiny = TIME_FRACTION * steps < SHORTEST or not _vary_threads(default) or kind != "cpu"
    if compile != "on" and (is_tiny if too_short else not (variations or compiles)):
        return Trial(default)
    with _StepTimer(task, batch, make_optimizer).running() as timer:
        try:
            if compile != "on" and too_short:
                return _check_threads(timer)
            compile = compile if compiles else "off"
            best, seconds = _search(timer, steps, variations, compile, note, not has_micro_batches)
        except torch.OutOfMemoryError:
            note("not enough memory to search for the fastest engine")
            return Trial(default)
    return Trial(best, {engine: timer.images / duration for engine, duration in seconds.items()})


def _check_threads(timer: "_StepTimer") -> Trial:
    """Return the default engine, or one thread if other load on the machine makes all of them far slower."""
    default = timer.task.engine
    single = replace(default, threads=1)
    seconds = {engine: timer.step(engine) for engine in (default, single)}
    if seconds[single] * HOPELESS >= seconds[default]:
        return Trial(default)
    return Trial(single, {engine: timer.images / duration for engine, duration in seconds.items()})


def _search(
    timer: "_StepTimer",
    steps: int,
    variations: Sequence[Variation],
    compile: str,
    note: Callable[[str], None],
    graphs: bool,
) -> tuple[Engine, dict[Engine, float]]:
    started = time.perf_counter()
    best = timer.task.engine
    seconds = {best: median(timer.step(best) for _ in range(MIN_STEPS))}
    total = seconds[best] * steps
    for vary in variations:
        left = TIME_FRACTION * total - (time.perf_counter() - started)
        n = min(MAX_STEPS, int(left / (2 * seconds[best])) - 1)
        candidate = vary(best)
        if candidate is not None and n >= MIN_STEPS:
            best = _faster(timer, best, candidate, n, seconds)
    kind = torch.device(best.device).type
    if compile == "on" or (compile == "auto" and total >= COMPILE_FROM[kind]):
        may_use_graphs = graphs and kind == "cuda" and seconds[best] < SMALL_STEP
        modes = ["default", "reduce-overhead"] if may_use_graphs else ["default"]
        for mode in modes[-1:] if compile == "on" else modes:
            candidate, started = replace(best, compile=mode), time.perf_counter()
            if not compiles(timer, candidate, note):
                break
            cost, before = time.perf_counter() - started, seconds[best]
            faster = _faster(timer, best, candidate, MAX_STEPS, seconds)
            if compile == "on" or (faster == candidate and (before - seconds[candidate]) * steps > cost):
                best = candidate
    return best, seconds


def _faster(
    timer: "_StepTimer", best: Engine, candidate: Engine, n: int, seconds: dict[Engine, float]
) -> Engine:
    """Return ``best`` unless the candidate is clearly faster; write median step times to ``seconds``."""
    timer.step(candidate)  # warm-up
    times: dict[Engine, list[float]] = {best: [], candidate: []}
    for _ in range(n):
        for engine in times:
            times[engine].append(timer.step(engine))
        if times[candidate][0] > HOPELESS * times[best][0]:
            break
        if len(times[best]) == MIN_STEPS and median(times[best]) > HOPELESS * median(times[candidate]):
            break
    seconds.update({engine: median(measured) for engine, measured in times.items()})
    faster = candidate if seconds[candidate] * MIN_SPEEDUP < seconds[best] else best
    timer.keep(faster)
    return faster


def compiles(timer: "_StepTimer", engine: Engine, note: Callable[[str], None]) -> bool:
    """Return True if a step can be compiled; otherwise note the reason."""
    try:
        timer.step(engine)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers raise: the step itself has run before
        reason = " ".join(str(error).split())[:200]
        note(f"compilation failed ({type(error).__name__}: {reason}); training continues uncompiled")
        return False
    return True


def check_compilation(
    task: DistillationTask,
    batch: tuple[Any, ...],
    make_optimizer: MakeOptimizer,
    engine: Engine,
    note: Callable[[str], None],
) -> Engine:
    """Return the engine of a resumed training, uncompiled if this machine cannot compile it."""
    if engine.compile == "off" or _is_distributed():  # a step of one rank would wait for the others
        return engine
    with _StepTimer(task, batch, make_optimizer).running() as timer:
        try:
            return engine if compiles(timer, engine, note) else replace(engine, compile="off")
        except torch.OutOfMemoryError:  # of the copy; training handles its own
            return engine


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def can_compile(kind: str) -> bool:
    """Return True if the compiler that torch.compile needs is installed."""
    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return kind == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def _vary_precision(engine: Engine) -> Engine | None:
    if not bf16_pays(engine.device):
        return None
    return replace(engine, precision="fp32" if engine.precision == "bf16" else "bf16")


def _vary_layout(engine: Engine) -> Engine:
    return replace(engine, layout="contiguous" if engine.layout == "channels_last" else "channels_last")


def _vary_threads(default: Engine) -> list[Variation]:
    """Use one thread per core instead of one per hyper-thread, half of the threads, or one."""
    if processor.THREADS is not None:
        return []
    counts = {cores(), *thread_counts(default.threads)} - {default.threads}
    return [partial(_set_threads, threads=count) for count in sorted(counts, reverse=True)]


def _set_threads(engine: Engine, threads: int) -> Engine | None:
    return replace(engine, threads=threads) if threads < engine.threads else None


class _StepTimer:
    """Times training steps on a copy of the task for each engine; numbers of threads share one."""

    def __init__(self, task: DistillationTask, batch: tuple[Any, ...], make_optimizer: MakeOptimizer) -> None:
        self.task, self.batch, self.make_optimizer = task, batch, make_optimizer
        self.images = len(batch[0])
        self.copies: dict[Engine, tuple[DistillationTask, torch.optim.Optimizer]] = {}
        self.has_graphs = False

    @contextmanager
    def running(self) -> Iterator["_StepTimer"]:
        """Keep random state and threads; free all memory at the end."""
        device, threads = self.task.engine.device, torch.get_num_threads()
        cuda = torch.device(device).type == "cuda"
        try:
            with torch.random.fork_rng(devices=[device] if cuda else []):
                yield self
        finally:
            torch.set_num_threads(threads)
            self.copies.clear()
            if self.has_graphs:  # frees their memory; other compiled code is reused
                torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()

    def step(self, engine: Engine) -> float:
        """Return the seconds of one training step, after a warm-up step of a new copy."""
        key = replace(engine, threads=1)
        use_threads(engine.threads)
        if key not in self.copies:
            self.has_graphs |= engine.compile == "reduce-overhead"
            task = _copy(self.task)
            task.use(engine)
            task.train()
            optimizer = self.make_optimizer(task)
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # a step costs the same, and the loss cannot diverge
            self.copies[key] = task, optimizer
            _step(task, optimizer, self.batch)
        task, optimizer = self.copies[key]
        started = time.perf_counter()
        _step(task, optimizer, self.batch)
        return time.perf_counter() - started

    def keep(self, engine: Engine) -> None:
        """Free the copies of other engines."""
        self.copies = {key: self.copies[key] for key in self.copies if key == replace(engine, threads=1)}


def _step(task: DistillationTask, optimizer: torch.optim.Optimizer, batch: tuple[Any, ...]) -> None:
    result = task(*batch)
    optimizer.zero_grad(set_to_none=True)
    result["loss"].backward()
    optimizer.step()
    if task.device.type == "cuda":
        torch.cuda.synchronize(task.device)


def _copy(task: DistillationTask) -> DistillationTask:
    """Copy a task. Teachers share their weights with the original."""
    shared = {id(tensor): tensor for tensor in (*task.teachers.parameters(), *task.teachers.buffers())}
    copied = copy.copy(task)
    copied._modules = {
        **task._modules,
        "trainable_module": copy.deepcopy(task.trainable_module),
        "teachers": copy.deepcopy(task.teachers, shared),
    }
    return copied
