"""The command in unusual environments: encodings, closed pipes and variables of torchrun."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from questpress.pipeline.runs import process
from questpress.pipeline.runs.device import threads

from tests.support import little
from tests.support.little import command


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(arguments, capture_output=True, timeout=60, env={**os.environ, **environment})


def test_output_encoding_without_a_character_gets_a_replacement(finished: Path, tmp_path: Path) -> None:
    result = run(command("compare", finished, "--out", tmp_path / "out"), PYTHONIOENCODING="cp932")
    assert result.returncode == 0 and result.stderr == b""
    assert b"\\u2013" in result.stdout and b"best" in result.stdout


def test_predictions_are_printed_in_any_encoding(finished: Path, data: Path, tmp_path: Path) -> None:
    image = Path(shutil.copy(data / "red" / "000.png", tmp_path / "größe 日本.png"))
    predict = [sys.executable, str(finished / "artifact" / "predict.py"), str(image)]
    for arguments in (command("predict", finished, image), predict):
        result = run(arguments, PYTHONIOENCODING="ascii")
        assert result.returncode == 0 and result.stderr == b""
        assert b"gr\\xf6\\xdfe \\u65e5\\u672c.png: " in result.stdout
    result = run([*predict, "--json"], PYTHONIOENCODING="ascii")
    assert json.loads(result.stdout)["image"] == str(image)


def test_reader_that_exits_early_ends_the_command_quietly() -> None:
    first = f"{sys.executable} -m questpress.pipeline models '*' | head -3"
    result = run(["sh", "-c", first])
    assert result.stderr == b"" and len(result.stdout.splitlines()) == 3
    assert "…" not in result.stdout.decode()


@pytest.mark.parametrize(
    ("variables", "ignored"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is ignored"),
        ({"RANK": "1"}, "RANK=1 is ignored"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is ignored"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 and WORLD_SIZE=2 are ignored"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "RANK=0 and WORLD_SIZE=two are ignored"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": ""}, None),
        ({}, None),
    ],
    ids=str,
)
def test_incomplete_variables_of_torchrun_are_reported_and_ignored(
    variables: dict[str, str],
    ignored: str | None,
    data: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert process.is_single_process() and process.is_main() and threads() >= 1
    result = little.check_success(little.job(data, tmp_path / "run", cache, "--dry-run"))
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == (ignored is not None)
    if ignored is not None:
        assert ignored in warnings[0] and "torchrun --nproc-per-node" in warnings[0]


def test_complete_variables_of_torchrun_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert not process.is_single_process() and not process.is_main()
    assert process.count_local_processes() == 2 and process.describe_ignored_variables() is None


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="requires glibc 2.35")
def test_command_keeps_freed_memory_unless_an_environment_variable_disables_it() -> None:
    code = """
import ctypes, resource
from questpress.pipeline.cli.main import cli
from questpress.pipeline.runs.process import return_freed_memory
cli.main(["--version"], standalone_mode=False)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def use():
    block = libc.malloc(40 << 20)
    libc.memset(block, 1, 40 << 20)
    libc.free(block)
use()
def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(count_faults(), return_freed_memory(), count_faults())
"""
    runs = [little.python(code, QUESTPRESS_ALLOCATOR=name) for name in ("", "system")]
    (kept, _, after_stage), (returned, *_) = (run.stdout.split()[-3:] for run in runs)
    assert int(kept) < 10 < 100 < min(int(returned), int(after_stage))


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], count: str | None
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    process.limit_spinning()
    assert variables.get("GOMP_SPINCOUNT") == count
