"""Rank-0 logging without torch: which of the processes of `torchrun` reports, and which one reports an error."""

import os
from datetime import timedelta
from functools import cache
from typing import Any

ANSWER = timedelta(seconds=10)
"""How long the processes' meeting point may take to answer."""


def is_single_process() -> bool:
    """Whether this process was not started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def is_main() -> bool:
    """Whether this is the process that speaks as long as all goes well."""
    return is_single_process() or os.environ.get("RANK") == "0"


def count_restarts() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def connect() -> None:
    """Remember the way to the processes' meeting point, which one of them may soon take with it."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _meeting.append(TCPStore(host, port, is_master=False, timeout=ANSWER))


@cache
def is_first_to_exit() -> bool:
    """Whether this process is the first to tell that the job ends before its time."""
    if is_single_process():
        return True
    try:
        return int(_meeting[-1].add(f"questpress ends {count_restarts()}", 1)) == 1
    except (IndexError, RuntimeError):  # they have not met, or it was in a process that is gone
        return is_main()


_meeting: list[Any] = []
