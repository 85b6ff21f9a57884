"""Two processes on one run folder: the second is refused, and a crash releases the lock."""

import subprocess
import sys

import pytest
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.files import LOCK_FILE, lock

from tests.support import little

HOLD = """
import sys, time
from pathlib import Path
from questpress.pipeline.runs.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(a_run):
    """A run folder that another process works on, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, a_run], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield a_run, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_and_changes_nothing(held, data, cache):
    folder, _ = held
    before = little.files(folder)
    result = little.job(data, folder, cache, "--fresh")
    little.refused(result, 1, "in use by another process")
    assert little.files(folder) == before


@pytest.mark.parametrize("command", [["bench", "--quick"], ["report"]])
def test_other_writers_of_a_locked_run_are_refused(held, command):
    folder, _ = held
    before = little.files(folder)
    result = little.compress(command[0], folder, *command[1:])
    little.refused(result, 1, "in use by another process")
    assert little.files(folder) == before


def test_crash_releases_the_lock(held):
    folder, process = held
    process.kill()
    process.wait()
    with lock(folder):
        pass


def test_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    with lock(tmp_path), pytest.raises(JobError, match="another process"), lock(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        _ = 1 / 0
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
