"""Rank-0 logging without torch: which of the processes of `torchrun` reports, and which one reports an error."""

import os
from datetime import timedelta
from functools import cache
from typing import Any

ANSWER = timedelta(seconds=10)
"""How long the processes' meeting point may take to answer."""


def alone() -> bool:
    """Whether this process was not started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def leads() -> bool:
    """Whether this is the process that speaks as long as all goes well."""
    return alone() or os.environ.get("RANK") == "0"


def attempt() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meet() -> None:
    """Remember the way to the processes' meeting point, which one of them may soon take with it."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _meeting.append(TCPStore(host, port, is_master=False, timeout=ANSWER))


@cache
def first_to_end() -> bool:
    """Whether this process is the first to tell that the job ends before its time."""
    if alone():
        return True
    try:
        return int(_meeting[-1].add(f"questpress ends {attempt()}", 1)) == 1
    except (IndexError, RuntimeError):  # they have not met, or it was in a process that is gone
        return leads()


_meeting: list[Any] = []
