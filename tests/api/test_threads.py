"""The Python API from several threads of one process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from questpress.export.runtime import Classifier, ImageError
from questpress.pipeline import compress
from questpress.pipeline.runs.results import Report

from tests.support import little


@pytest.fixture
def train(data: Path, cache: Path) -> Callable[..., Report]:
    """Return a function that runs a job up to its student."""

    def run(out: Path, **options: Any) -> Report:
        return compress(
            teacher=little.TEACHER, student=little.STUDENT, data=data, teacher_weights="none", image_size=16,
            batch_size=16, teacher_epochs=2, epochs=2, method="kd", until="student", quiet=True, out=out,
            cache=cache, **options,
        )  # fmt: skip

    return run


def test_concurrent_jobs_equal_separate_jobs(train: Callable[..., Report], tmp_path: Path) -> None:
    seeds = (3, 4)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda seed: train(tmp_path / f"concurrent{seed}", seed=seed), seeds))
    concurrent = [little.weights(tmp_path / f"concurrent{seed}" / "student.safetensors") for seed in seeds]
    alone = []
    for seed in seeds:
        train(tmp_path / f"alone{seed}", seed=seed)
        alone.append(little.weights(tmp_path / f"alone{seed}" / "student.safetensors"))
    assert concurrent == alone
    assert alone[0] != alone[1]


def test_job_that_fails_in_its_thread_leaves_the_turn_to_the_next(
    train: Callable[..., Report], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train, tmp_path / "a", seed=-1).exception(timeout=60) is not None
    assert train(tmp_path / "b", seed=1).student is not None


def test_classifier_is_thread_safe(finished: Path, data: Path) -> None:
    classifier = Classifier.load(finished / "artifact", threads=1)
    files = sorted(data.rglob("*.png"))[::4]
    expected = {file: classifier.predict([file])[0] for file in files}
    damaged = files[0].read_bytes()[:200]

    def predict(number: int) -> int:
        count = 0
        for file in files[number:] + files[:number]:
            assert classifier.predict([file]) == [expected[file]]
            with pytest.raises(ImageError):
                classifier.predict([file, damaged])
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(predict, range(4))) == [len(files)] * 4
