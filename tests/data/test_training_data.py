import hashlib
from pathlib import Path

import pytest
from questpress.pipeline.data import training_data
from questpress.pipeline.data.dataset import Image
from questpress.pipeline.data.decode import Canonical, decode_images
from questpress.pipeline.data.training_data import TrainingData, canonical_bytes, choose_placement
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.cache import Cache

from tests.support.pictures import folder, in_memory, open_folder, pixels

FORM = Canonical("short_side", 32)


def test_later_decoding_that_leaves_out_other_images_is_an_error(tmp_path: Path) -> None:
    images = open_folder(folder(tmp_path, {"a": 4, "b": 4})).train
    first, second = images[:2]
    data = TrainingData(None, None, None, "cpu", lambda *_: None)  # type: ignore[arg-type]
    (tmp_path / first.name).write_bytes(b"no image")
    broken = Image(first.name, 0, hashlib.sha256(b"no image").hexdigest(), tmp_path / first.name)
    decoded = decode_images([broken, second], FORM)
    assert data.check_kept([broken, second], decoded) is decoded  # before there is a record
    data.skipped_names = frozenset([first.name, "a/link"])
    assert data.check_kept([broken, second], decoded) is decoded
    data.skipped_names = frozenset()
    with pytest.raises(
        JobError, match=rf"{first.name} is unreadable \(not an image.*start over with --fresh"
    ):
        data.check_kept([broken, second], decoded)
    data.skipped_names = frozenset([first.name, second.name])
    with pytest.raises(JobError, match=f"{second.name} is readable, which it was not"):
        data.check_kept([broken, second], decoded)


def test_total_size_is_estimated_from_a_sample_of_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = in_memory([pixels(n, 40 + n, 90) for n in range(20)])
    exact = decode_images(images, FORM).pixels.data.nbytes
    assert canonical_bytes(images, FORM) == exact
    monkeypatch.setattr("questpress.pipeline.data.decode.SAMPLE", 5)
    assert canonical_bytes(images, FORM) == pytest.approx(exact, rel=0.1)
    assert canonical_bytes(images, Canonical("fixed", 24)) == 20 * 3 * 24**2
    files = open_folder(folder(tmp_path, {"a": 4, "b": 4})).train
    (tmp_path / files[0].name).write_bytes(b"no image")
    assert canonical_bytes(files, FORM) == len(files) * 3 * 12 * 16
    assert canonical_bytes([], FORM) == 0


@pytest.mark.parametrize(
    ("device", "memory", "disk", "way", "word"),
    [
        (1e9, 1e9, 1e9, "device", ""),
        (1e9, 1e3, 1e9, "device", ""),
        (1e3, 1e9, 1e9, "host", "free on cuda"),
        (1e3, 1e3, 1e9, "workers", "of memory"),
        (1e9, 1e9, 1e3, "workers", "free at"),
    ],
)
def test_pixels_are_kept_where_they_fit_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device, memory, disk, way: str, word: str
) -> None:
    images = in_memory([pixels(n) for n in range(4)])  # 2,304 bytes
    monkeypatch.setattr(training_data, "free_memory", lambda _: device)
    monkeypatch.setattr(training_data, "host_memory", lambda: memory)
    monkeypatch.setattr(training_data, "free_disk", lambda _: disk)
    cache = Cache(tmp_path)
    chosen, why = choose_placement(images, FORM, "cuda", cache)
    assert chosen == way and word in (why or "") and (why is None) == (way == "device")
    if disk == 1e3:
        decode_images(images, FORM, cache=cache)
        assert choose_placement(images, FORM, "cuda", cache)[0] == "device"  # cached images need no disk


def test_gpu_that_shares_the_hosts_memory_is_limited_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = in_memory([pixels(n) for n in range(4)])
    monkeypatch.setattr(training_data, "host_memory", lambda: 1e3)
    assert choose_placement(images, FORM, "mps", Cache(tmp_path))[0] == "workers"
    assert choose_placement(images, FORM, "cpu", Cache(tmp_path))[0] == "device"  # a mapped file


def test_this_machine_has_memory_and_a_disk(tmp_path: Path) -> None:
    assert training_data.host_memory() > 1e6
    assert training_data.free_disk(tmp_path / "not" / "yet") == pytest.approx(
        training_data.free_disk(tmp_path), rel=0.1
    )
