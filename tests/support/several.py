"""Start the processes of a distributed job as torchrun does, from a fork server that has imported torch."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["questpress.pipeline.api.run", "questpress.pipeline.stages.student"])


class Started:
    """Started processes; the output of each is in a file."""

    def __init__(self, folder: Path, processes: list[BaseProcess]) -> None:
        self.folder, self.processes = folder, processes

    def codes(self, seconds: float = 120) -> list[int | None]:
        """Wait for the processes and return their exit codes."""
        for process in self.processes:
            process.join(seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def output(self, number: int) -> str:
        return (self.folder / f"{number}.txt").read_text(encoding="utf-8")


def start(folder: Path, do: Callable[..., Any], *arguments: Any, count: int = 2) -> Started:
    """Run ``do(*arguments)`` in ``count`` processes with torchrun's environment variables."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run, args=(number, count, port, folder, do, arguments))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    return Started(folder, processes)


def command(*arguments: str | Path) -> None:
    """Run the command line."""
    from questpress.pipeline.cli.main import cli

    if hasattr(os, "sched_setaffinity"):  # one thread each
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[int(os.environ["RANK"]) % len(allowed)]})
    sys.argv = ["compress", *map(str, arguments)]
    cli(prog_name="compress")


def _run(
    number: int, count: int, port: int, folder: Path, do: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    output = os.open(folder / f"{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    do(*arguments)
