"""A student made hard to quantize: naively it is ruined, and the search holds the budget."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from questpress.export import runtime
from questpress.export.conversion.onnx_export import export_onnx
from questpress.export.int8.quantizer import METHODS, prepare
from questpress.export.int8.search import search
from questpress.export.int8.targets import find_target
from questpress.export.results import Verdict
from sklearn.datasets import load_digits
from torch import nn


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 12, 12, 12, 16, 16)
        self.layers = nn.ModuleList(
            nn.Conv2d(given, made, 3, 2 if i in (0, 3) else 1, 1)
            for i, (given, made) in enumerate(pairwise(widths))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    """A network that reads digits and is hard to quantize; calibration images, images that decide, labels."""
    digits = load_digits()
    gray = np.kron(digits.images / 16, np.ones((2, 2))).astype(np.float32)
    x = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    network = Digits()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for epoch in range(20):
        for batch in torch.randperm(1400, generator=torch.Generator().manual_seed(epoch)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    for writer, reader in pairwise(network.layers):
        scale = torch.ones(len(writer.bias))
        scale[::4] = 100
        with torch.no_grad():
            writer.weight.mul_(scale[:, None, None, None])
            writer.bias.mul_(scale)
            reader.weight.div_(scale[None, :, None, None])
    path = tmp_path_factory.mktemp("hard") / "hard.onnx"
    export_onnx(network.eval(), path, 16, metadata={})
    return path, x[:128].numpy(), x[1400:].numpy(), y[1400:].numpy()


def compute_logits(path: Path, batch: np.ndarray) -> np.ndarray:
    return runtime.open_session(path, 1, fuse=False).run(None, {"input": batch})[0]


def judge_by(fp32: Path, batch: np.ndarray, labels: np.ndarray) -> Callable[[Path], Verdict]:
    exact = compute_logits(fp32, batch)
    right = (exact.argmax(1) == labels).mean() * 100

    def judge(path: Path) -> Verdict:
        logits = compute_logits(path, batch)
        score = float((logits.argmax(1) == labels).mean() * 100)
        noise = float(np.square(logits - exact).sum())
        sqnr = float(10 * np.log10(np.square(exact).sum() / noise))
        lost = float(right - score)
        return Verdict(score=score, lost=lost, holds=lost <= 0.6, sqnr=sqnr)

    return judge


class _Images(CalibrationDataReader):
    def __init__(self, batch: np.ndarray) -> None:
        self.left = [{"input": batch}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_student_that_naive_quantization_ruins_keeps_its_accuracy(
    hard: tuple[Path, np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    fp32, calibration, rest, labels = hard
    quantize_static(
        *(str(fp32), str(tmp_path / "naive.onnx"), _Images(calibration)),
        per_channel=False,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    of_float, of_naive = (
        (compute_logits(p, rest).argmax(1) == labels).mean() for p in (fp32, tmp_path / "naive.onnx")
    )
    assert of_float > 0.8 and of_naive < of_float - 0.4
    judge = judge_by(fp32, rest, labels)
    for name in ("x86", "x86-vnni", "arm64"):
        (tmp_path / name).mkdir()
        result = search(prepare(fp32), [calibration], find_target(name), tmp_path / name, judge)
        assert result.chosen is not None
        chosen, file = result.candidates[result.chosen], result.files[result.chosen]
        assert chosen.lost <= 0.6  # two images
        assert (compute_logits(file.path, rest).argmax(1) == labels).mean() >= of_float - 0.006
        # No calibrator was enough: the channels had to be brought together.
        assert chosen.equalized
        calibrated = result.candidates[: len(METHODS)]
        assert [candidate.name for candidate in calibrated] == list(METHODS)
        assert not any(candidate.holds for candidate in calibrated)


def test_whole_search_gives_the_same_candidates_and_bytes_again(
    hard: tuple[Path, np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    fp32, calibration, rest, labels = hard
    judge = judge_by(fp32, rest, labels)

    def strict(path: Path) -> Verdict:
        return judge(path).model_copy(update={"holds": False})  # so that every step is taken

    results = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        results.append(
            search(prepare(fp32), [calibration], find_target("x86-vnni"), tmp_path / folder, strict)
        )
    first, second = results
    assert first.sources == second.sources and first.chosen is second.chosen is None
    assert len(first.candidates) > len(METHODS) + 2
    assert first.candidates == second.candidates
    for a, b in zip(first.files, second.files, strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()
        assert json.dumps(a.recipe) == json.dumps(b.recipe)
