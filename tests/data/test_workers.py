import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from questpress.pipeline.data.workers import Workers, share_memory, worker_count
from questpress.pipeline.errors import JobError
from torch import Tensor


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(2)


@dataclass(frozen=True)
class Number:
    """A task: its number, as a tensor; an odd one takes longer."""

    value: int

    def __call__(self) -> Tensor:
        time.sleep(0.02 * (self.value % 2))
        return torch.full((2, 3), self.value)


def fail(sentence: str) -> None:
    raise JobError(sentence)


def die() -> None:
    os.kill(os.getpid(), 9)


def test_results_come_in_the_order_of_their_tasks(workers: Workers) -> None:
    for count in (0, 1, 11):
        results = list(workers.map(Number(n) for n in range(count)))
        assert [int(x[0, 0]) for x in results] == list(range(count))
        assert all(x.equal(torch.full((2, 3), n)) for n, x in enumerate(results))


def test_abandoned_tasks_are_dropped(workers: Workers) -> None:
    left = workers.map(Number(n) for n in range(20))
    assert int(next(left)[0, 0]) == 0
    processes = workers.processes
    left.close()
    for process in processes:
        process.join()
    assert [int(x[0, 0]) for x in workers.map(Number(n) for n in range(100, 105))] == [*range(100, 105)]


def test_workers_do_not_change_the_random_state(workers: Workers) -> None:
    before = torch.get_rng_state()
    list(workers.map([Number(1)]))
    assert torch.get_rng_state().equal(before)


def test_workers_have_one_thread_and_ignore_signals(workers: Workers) -> None:
    results = workers.map([torch.get_num_threads] * 20)
    assert [next(results) for _ in range(4)] == [1] * 4  # every worker has started
    for process in workers.processes:
        os.kill(process.pid, 2)
        os.kill(process.pid, 15)
    assert list(results) == [1] * 16


def test_task_error_is_raised_in_the_parent(workers: Workers) -> None:
    results = workers.map([Number(0), partial(fail, "a/1.jpg has changed."), Number(2)])
    next(results)
    with pytest.raises(JobError, match=r"^a/1.jpg has changed.$"):
        next(results)


def test_unexpected_error_keeps_its_traceback(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="Original Traceback"):
        list(workers.map([partial(torch.zeros(2).view, 3)]))


def test_dead_worker_is_reported_and_replaced() -> None:
    workers = Workers(1)
    with pytest.raises(JobError) as caught:
        list(workers.map([Number(0), die, Number(1)]))
    assert "was killed" in str(caught.value) and "--resident host" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(workers.map([Number(0)]))) == 1
    assert not any(process.is_alive() for process in workers.processes)


def test_results_are_piped_if_shared_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Tensor) -> Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    monkeypatch.setattr(Tensor, "share_memory_", full)
    sent = share_memory(torch.arange(6).view(2, 3))
    np.testing.assert_array_equal(sent, np.arange(6).reshape(2, 3))
    assert isinstance(sent, np.ndarray)


SCRIPT = """
import sys, time, torch
from functools import partial
from questpress.pipeline.data.workers import Workers
print("once", flush=True)
workers = Workers(2)
results = workers.map([partial(time.sleep, 0.1)] + [partial(time.sleep, 60)] * 5)
next(results)
print(*[process.pid for process in workers.processes], flush=True)
next(results)
"""


def there(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits to be reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [2, 9])
def test_killed_job_leaves_no_workers_and_scripts_need_no_guard(tmp_path: Path, number: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    job = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "once\n"
    pids = [int(pid) for pid in job.stdout.readline().split()]
    assert len(pids) == 2 and all(map(there, pids))
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    for _ in range(100):
        if not any(map(there, pids)):
            break
        time.sleep(0.1)
    assert not any(map(there, pids))
    assert errors.count("Traceback") == (1 if number == 2 else 0)  # the script's own, and no worker's


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("questpress.pipeline.data.workers.allowed_cores", lambda: 16)
    assert (worker_count("cuda"), worker_count("cpu")) == (15, 8)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (worker_count("cuda"), worker_count("cpu")) == (3, 2)
    monkeypatch.setattr("questpress.pipeline.data.workers.allowed_cores", lambda: 1)
    assert worker_count("cuda") == 1
