"""Weight averages of --ema and --average-last, compared with numpy."""

from pathlib import Path

import numpy as np
import pytest
from questpress.pipeline.training.task import Averages, DistillationTask
from torch import nn

from tests.support import little
from tests.support.little import report, weights
from tests.support.toys import learn, supervised

State = dict[str, np.ndarray]


def taken(network: nn.Module) -> State:
    return {name: value.detach().double().numpy().copy() for name, value in network.state_dict().items()}


def watched(task: DistillationTask, tmp_path: Path) -> tuple[list[State], list[State]]:
    """Return the network's state after each step, and after each epoch."""
    steps: list[State] = []
    ends: list[State] = []
    real = task.end_step

    def end_step() -> None:
        real()
        steps.append(taken(task.network))

    task.end_step = end_step  # type: ignore[method-assign]
    learn(task, tmp_path / "c.pt", log=lambda _: ends.append(taken(task.network)))
    return steps, ends


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_running_mean_is_the_recursion_over_all_steps(tmp_path: Path, decay: float) -> None:
    task = supervised(ema=decay)
    steps, _ = watched(task, tmp_path)
    assert len(steps) == 9
    mean = steps[0]  # the first step's own weights: nothing is kept of those that were never trained
    for number, now in enumerate(steps[1:], 1):
        d = min(decay, 1 - (1 + number) ** (-2 / 3))  # timm's warm-up
        mean = {name: d * mean[name] + (1 - d) * now[name] for name in mean}
    shipped = taken(task.shipped)
    assert task.shipped is not task.network
    for name, value in shipped.items():
        if "num_batches" not in name:
            np.testing.assert_allclose(value, mean[name], atol=1e-5, err_msg=name)
    assert any(np.abs(shipped[name] - steps[-1][name]).max() > 1e-4 for name in shipped)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_average_of_the_last_epochs_is_their_mean_statistics_included(tmp_path: Path, last: int) -> None:
    task = supervised(average_last=last)
    _, ends = watched(task, tmp_path)
    shipped = taken(task.shipped)
    for name, value in shipped.items():
        if "num_batches" not in name:
            mean = np.mean([end[name] for end in ends[-last:]], axis=0)
            np.testing.assert_allclose(value, mean, atol=1e-6, err_msg=name)


def test_network_itself_is_evaluated_before_averaging() -> None:
    network = supervised().network
    averages = Averages(network, last=2)
    averages.end_epoch(epochs_left=2)
    assert averages.shipped is network
    averages.end_epoch(epochs_left=1)
    assert averages.shipped is not network


@pytest.mark.parametrize("option", [("--ema", "0.9"), ("--average-last", "2")])
def test_averaged_network_is_evaluated_and_shipped(finished, data, cache, tmp_path, option):
    out = tmp_path / "run"
    little.check_success(little.job(data, out, cache, "--until", "export", *option))
    assert weights(out / "teacher.safetensors") == weights(finished / "teacher.safetensors")
    assert weights(out / "student.safetensors") != weights(finished / "student.safetensors")
    last = [e["val_accuracy"] for e in report(out)["epochs"] if e["stage"] == "student"][-1]
    subject = report(out)["student"]
    assert subject["val_score"]["percent"] == last
    assert subject["parity"]["max_abs"] < 1e-4  # the exported file is that network too
