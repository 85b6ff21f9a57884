"""The fastest engine for a training: a short race over its own steps, before the first of them counts.

What is fastest depends on processor, network and batch, and no rule knows it well: bf16 gains 70 % on one
network and loses half on another of the same machine (``docs/performance.md``). So the rule's choice is
raced against one alternative after another, step by step in turns, and gives way to what is clearly faster.
The race runs on a copy of what is trained; weights, statistics and random state stay untouched. It takes at
most ``SHARE`` of the training's time; a training too short for that keeps the rule's choice.
"""

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from ...runs.device import Engine, bf16_pays, cores, use_threads
from ..task import DistillationTask

SHARE = 0.02
"""Most of the training's time that races may take, compiling apart."""

CLEARLY = 1.05
"""Another engine is chosen where its steps are so many times faster than the rule's, or more."""

ROUNDS = (3, 9)
"""Fewest and most steps of each engine in a race."""

HOPELESS = 2.0
"""An engine so many times slower in the first round is out."""

COMPILE_FROM = {"cpu": 3600.0, "cuda": 600.0}
"""Seconds of training from which on it is tried whether compiling, of about a minute, pays."""

SMALL_STEP = 0.05
"""A GPU's step of fewer seconds may be spent on launching kernels: then CUDA graphs are tried too."""


@dataclass(frozen=True)
class Trial:
    """The engine that was chosen, and what was measured on the way."""

    engine: Engine
    rates: Mapping[Engine, float] = field(default_factory=dict)
    """Images a second of every engine that was raced."""

    def __str__(self) -> str:
        best = f"{self.engine}: {self.rates[self.engine]:.0f} images/s"
        others = [
            f"{rate:.0f} {_difference(engine, self.engine)}"
            for engine, rate in self.rates.items()
            if engine != self.engine
        ]
        return ", against ".join([best, " and ".join(others)] if others else [best])


MakeOptimizer = Callable[[DistillationTask], torch.optim.Optimizer]
Challenge = Callable[[Engine], Engine | None]


def fastest(
    task: DistillationTask,
    batch: tuple[Any, ...],
    make_optimizer: MakeOptimizer,
    steps: int,
    *,
    precision: str,
    compile: str,
    note: Callable[[str], None],
) -> Trial:
    """The engine for so many ``steps`` of ``task`` over batches like ``batch``.

    Args:
        batch: what the task is called with.
        precision: ``auto``, or what the user fixed.
        compile: ``auto``, ``on`` or ``off``.
        note: told where compiling or the race itself fails.
    """
    rule = task.engine
    kind = torch.device(rule.device).type
    if _several_processes():
        # They must compute alike, and each would find its own.
        return Trial(replace(rule, compile="default") if compile == "on" else rule)
    least = 4 * (1 + ROUNDS[0])  # steps: the rule's engine alone, a race, and room for slower steps in it
    raced: Sequence[Challenge] = [_precision, _layout, _threads] if kind == "cpu" else []
    raced = raced if precision == "auto" else raced[1:]
    compiles = compile == "auto" and kind in COMPILE_FROM and can_compile(kind)
    if compile != "on" and (not (raced or compiles) or SHARE * steps < least):
        return Trial(rule)
    runners, threads = _Runners(task, batch, make_optimizer), torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[rule.device] if kind == "cuda" else []):
            return _fastest(runners, steps, raced, compile, compiles, note)
    except torch.OutOfMemoryError:
        note("there is too little memory to try which engine is fastest")
        return Trial(rule)
    finally:
        torch.set_num_threads(threads)
        runners.close()


def _fastest(
    runners: "_Runners",
    steps: int,
    raced: Sequence[Challenge],
    compile: str,
    compiles: bool,
    note: Callable[[str], None],
) -> Trial:
    started = time.perf_counter()
    best = runners.task.engine
    seconds = {best: median(runners.seconds(best) for _ in range(ROUNDS[0]))}
    total = seconds[best] * steps
    for challenge in raced:
        left = SHARE * total - (time.perf_counter() - started)
        rounds = min(ROUNDS[1], int(left / (2 * seconds[best])) - 1)
        challenger = challenge(best)
        if challenger is None or rounds < ROUNDS[0]:
            continue
        best = _race(runners, best, challenger, rounds, seconds)
    if compile == "on":
        small = torch.device(best.device).type == "cuda" and seconds[best] < SMALL_STEP
        best = attempt(runners, replace(best, compile="reduce-overhead" if small else "default"), note)
        seconds[best] = median(runners.seconds(best) for _ in range(ROUNDS[0]))
    elif compiles and total >= COMPILE_FROM[torch.device(best.device).type]:
        for mode in _modes(best, seconds[best]):
            begun = time.perf_counter()
            compiled = attempt(runners, replace(best, compile=mode), note)
            cost = time.perf_counter() - begun
            if compiled.compile == "off":
                break
            uncompiled = replace(best, compile="off")
            won = _race(runners, best, compiled, ROUNDS[1], seconds)
            if won == compiled and (seconds[uncompiled] - seconds[won]) * steps > cost:
                best = won
    return Trial(best, {engine: runners.images / taken for engine, taken in seconds.items()})


def attempt(runners: "_Runners", engine: Engine, note: Callable[[str], None]) -> Engine:
    """The engine, or the same uncompiled where compiling fails, which is told."""
    try:
        runners.seconds(engine)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers raise; the step itself has run before
        first = " ".join(str(error).split())[:200]
        note(f"compiling failed ({type(error).__name__}: {first}), so the training goes on uncompiled")
        runners.drop(engine)
        return replace(engine, compile="off")
    return engine


def compiled_or_not(
    task: DistillationTask,
    batch: tuple[Any, ...],
    make_optimizer: MakeOptimizer,
    engine: Engine,
    note: Callable[[str], None],
) -> Engine:
    """The engine that a training was begun with; uncompiled where this machine cannot compile it any more."""
    if engine.compile == "off" or _several_processes():  # a step of one alone would wait for the others
        return engine
    kind = torch.device(engine.device).type
    runners = _Runners(task, batch, make_optimizer)
    try:
        with torch.random.fork_rng(devices=[engine.device] if kind == "cuda" else []):
            return attempt(runners, engine, note)
    except torch.OutOfMemoryError:  # of the copy beside the task; the training knows what to do with its own
        return engine
    finally:
        runners.close()


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def can_compile(kind: str) -> bool:
    """Whether torch.compile finds what it needs on this kind of device."""
    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return kind == "cpu" and any(shutil.which(one) for one in (os.environ.get("CXX", "g++"), "clang++"))


def _race(
    runners: "_Runners", best: Engine, challenger: Engine, rounds: int, seconds: dict[Engine, float]
) -> Engine:
    """The faster of two engines, the first unless the second clearly is; medians go to ``seconds``."""
    runners.seconds(challenger)  # to warm up
    taken: dict[Engine, list[float]] = {best: [], challenger: []}
    for _ in range(rounds):
        for engine, times in taken.items():
            times.append(runners.seconds(engine))
        if taken[challenger][0] > HOPELESS * taken[best][0]:
            break
    for engine, times in taken.items():
        seconds[engine] = median(times)
    faster = seconds[challenger] * CLEARLY < seconds[best]
    runners.drop(best if faster else challenger)
    return challenger if faster else best


def _precision(engine: Engine) -> Engine | None:
    if not bf16_pays(engine.device):
        return None
    return replace(engine, precision="fp32" if engine.precision == "bf16" else "bf16")


def _layout(engine: Engine) -> Engine:
    return replace(engine, layout="contiguous" if engine.layout == "channels_last" else "channels_last")


def _threads(engine: Engine) -> Engine | None:
    """One thread a core where a core has several."""
    return replace(engine, threads=cores()) if cores() < engine.threads else None


def _modes(engine: Engine, seconds: float) -> Iterator[str]:
    yield "default"
    if torch.device(engine.device).type == "cuda" and seconds < SMALL_STEP:
        yield "reduce-overhead"


class _Runners:
    """For each engine that is tried, a copy of the task that takes steps without consequences."""

    def __init__(self, task: DistillationTask, batch: tuple[Any, ...], make_optimizer: MakeOptimizer) -> None:
        self.task, self.batch, self.make_optimizer = task, batch, make_optimizer
        self.images = len(batch[0])
        self.copies: dict[Engine, tuple[DistillationTask, torch.optim.Optimizer]] = {}
        self.graphs = False

    def seconds(self, engine: Engine) -> float:
        """How long one training step takes; an engine's first one is there to warm up."""
        if engine not in self.copies:
            self.graphs |= engine.compile == "reduce-overhead"
            made = _copy(self.task)
            made.use(engine)
            made.train()
            optimizer = self.make_optimizer(made)
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the work of a step is the same, and nothing can run away
            self.copies[engine] = made, optimizer
            use_threads(engine.threads)
            self._step(made, optimizer)
        made, optimizer = self.copies[engine]
        use_threads(engine.threads)
        self._wait(engine)
        started = time.perf_counter()
        self._step(made, optimizer)
        self._wait(engine)
        return time.perf_counter() - started

    def drop(self, engine: Engine) -> None:
        """Give back the memory of an engine that is out."""
        self.copies.pop(engine, None)

    def close(self) -> None:
        """Give back all memory, that of CUDA graphs too; what is compiled otherwise is used again."""
        self.copies.clear()
        if self.graphs:
            torch.compiler.reset()
        if torch.device(self.task.engine.device).type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, task: DistillationTask, optimizer: torch.optim.Optimizer) -> None:
        result = task(*self.batch)
        optimizer.zero_grad(set_to_none=True)
        result["loss"].backward()
        optimizer.step()

    @staticmethod
    def _wait(engine: Engine) -> None:
        if torch.device(engine.device).type == "cuda":
            torch.cuda.synchronize(engine.device)


def _copy(task: DistillationTask) -> DistillationTask:
    """The task with a student, heads and optimizer's targets of its own; teachers share their weights."""
    frozen = {id(one): one for one in (*task.teachers.parameters(), *task.teachers.buffers())}
    made = copy.copy(task)
    parts: dict[str, Any] = {
        "trainable_module": copy.deepcopy(task.trainable_module),
        "teachers": copy.deepcopy(task.teachers, frozen),
    }
    made._modules = {**task._modules, **parts}
    return made


def _difference(engine: Engine, best: Engine) -> str:
    """How an engine differs from the best one, in words."""
    parts = [f"in {engine.precision}"] if engine.precision != best.precision else []
    if engine.layout != best.layout:
        parts.append(engine.layout.replace("_", " "))
    if engine.threads != best.threads:
        parts.append(f"on {engine.threads} threads")
    if engine.compile != best.compile:
        parts.append(
            {"off": "uncompiled", "default": "compiled", "reduce-overhead": "as CUDA graphs"}[engine.compile]
        )
    return " ".join(parts)
