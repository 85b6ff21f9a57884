"""The first hour on a GPU, for one epoch on the CPU: slices that continue, and the table."""

import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import cells, gpu_first_hour
from benchmarks.papers import crd
from benchmarks.training import compiled, throughput
from tests.support import little

TINY = (
    "--seconds", "0.01", "--rounds", "2", "--images", "16", "--batch", "8", "--words", "8", "--classes", "3",
    "--subjects", "supervised",
)  # fmt: skip


class Machine:
    """Runs commands in this process, ``left`` of them until the slice ends. Those of ``fails`` fail once."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.left = 100
        self.fails = {compiled.__name__}

    def run(
        self, command: Sequence[str], seconds: float | None, stop: Callable[[], bool] = lambda: False
    ) -> int | None:
        if not self.left:
            return None
        self.left -= 1
        module, arguments = command[2], command[3:]
        self.modules.append(module)
        if module in self.fails:
            self.fails.remove(module)
            return 1
        if module != "questpress.pipeline":
            importlib.import_module(module).main([*arguments, "--threads", "1", "--workers", "0"])
            return 0
        ended, stopped = threading.Event(), threading.Event()

        def watch() -> None:
            while not ended.wait(0.005):
                if stop():
                    stopped.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    break

        watcher = threading.Thread(target=watch)
        watcher.start()
        words = ["--set", "quest.words=8"] if "quest-cifar100" in arguments else []
        result = little.compress(*arguments, *words, "--threads", "1", *little.SMALL)
        ended.set()
        watcher.join()
        assert stopped.is_set() or result.exit_code == 0, result.output
        return None if stopped.is_set() else result.exit_code


def test_first_hour_continues_where_a_slice_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, hour = Machine(), gpu_first_hour
    monkeypatch.setattr(cells, "run_command", machine.run)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tiny = throughput.Pair(little.TEACHER, little.STUDENT, 16)
    monkeypatch.setattr(throughput, "PAIRS", {"resnet56-resnet20": tiny})
    monkeypatch.setattr(throughput, "PEERS", {})
    monkeypatch.setattr(compiled, "STEPS", 2)
    monkeypatch.setitem(crd.PAIRS, "r56:r20", (little.TEACHER, little.STUDENT, {"none": 50.0}))
    for name, value in {
        "PAIRS": ("r56:r20",), "METHODS": ("none",), "COMPILED": ("supervised",), "TIMED": TINY,
        "CHECKED_EPOCHS": 4, "STOP_AT": 0.0,
    }.items():  # fmt: skip
        monkeypatch.setattr(hour, name, value)
    split = {f"{part}/{name}": 12 for part in ("train", "test") for name in little.CLASSES}
    data, out = little.photos(tmp_path / "data", split), tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "4"]
    threads = torch.get_num_threads()
    try:
        machine.left = 4  # throughput, compilation, the uninterrupted and the stopped run
        hour.main(arguments)
        assert "the same command resumes" in capsys.readouterr().out
        table = (out / "results.md").read_text()
        assert "| compiled supervised | failed with exit code 1 |" in table
        assert "| stopped run | done |" in table and "| resumed run | left |" in table
        assert f"| accuracy {little.TEACHER}.teacher.0 | left |" in table
        machine.left = 100
        hour.main(arguments)
    finally:
        torch.set_num_threads(threads)
    table = (out / "results.md").read_text()
    assert "| left |" not in table and "failed" not in table
    assert "| run on two GPUs | skipped: it requires two GPUs |" in table
    assert any(
        line.startswith("| resumed run |") and "equal to the bit" in line for line in table.splitlines()
    )
    results = json.loads((out / "results.json").read_text())
    losses = results["results"]["compiled supervised"]["compiled"][0]["losses"]
    assert losses["compiled"] == losses["uncompiled"]
    [pair] = results["results"]["throughput resnet56-resnet20"]["pairs"]
    assert {row["subject"] for row in pair["rates"]} == {"supervised"}
    assert [cell["top1"] for cell in results["cells"].values()]
    assert "| r56:r20 | none | " in table
    assert machine.modules[:2] == [throughput.__name__, compiled.__name__]
    assert machine.modules[-1] == compiled.__name__ and machine.modules.count(compiled.__name__) == 2
    assert len(machine.modules) == 8
    hour.main(arguments)
    assert len(machine.modules) == 8
