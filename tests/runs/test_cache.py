import errno
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from questpress.pipeline.errors import JobError
from questpress.pipeline.runs.cache import Cache


def writing(text: str):
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep/b.txt").write_text(text * 2)

    return write


def test_cache_entry_round_trips(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("words", "k") is None
    place = cache.put("words", "k", writing("x"))
    assert cache.get("words", "k") == place == tmp_path / "words/k"
    assert (place / "deep/b.txt").read_text() == "xx"
    assert cache.get("words", "other") is None and cache.get("images", "k") is None


@pytest.mark.parametrize("damage", ["changed", "lost", "added", "no checksums", "bad checksums"])
def test_damaged_entry_is_never_trusted(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    place = cache.put("words", "k", writing("x"))
    match damage:
        case "changed":
            (place / "deep/b.txt").write_text("xy")
        case "lost":
            (place / "a.txt").unlink()
        case "added":
            (place / "c.txt").write_text("")
        case "no checksums":
            (place / "sha256.json").unlink()
        case "bad checksums":
            (place / "sha256.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        assert cache.get("words", "k") is None
    assert "removed and made again" in caplog.text
    assert list((tmp_path / "words").iterdir()) == []
    assert cache.put("words", "k", writing("new")) == place == cache.get("words", "k")


def test_failed_cache_write_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).put("words", "k", write)
    assert list((tmp_path / "words").iterdir()) == []


def _put(root: Path, number: int) -> None:
    def write(folder: Path) -> None:
        for part in range(20):
            (folder / f"{part}").write_text(f"{number}" * 1000)
            time.sleep(0.002)

    place = Cache(root).put("words", "k", write)
    assert len({(place / f"{part}").read_text() for part in range(20)}) == 1


def test_concurrent_writers_get_a_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    writers = [context.Process(target=_put, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert Cache(tmp_path).get("words", "k") is not None
    assert [entry.name for entry in (tmp_path / "words").iterdir()] == ["k"]


def test_parts_of_killed_processes_are_removed_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name, age in (("old", 2 * 86400), ("new", 60)):
        left = tmp_path / "words" / f".{name}.1.part"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    cache.put("words", "k", writing("x"))
    assert {entry.name for entry in (tmp_path / "words").iterdir()} == {"k", ".new.1.part"}


def test_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    assert cache.get("words", "k") is None
    with caplog.at_level(logging.WARNING):
        place = cache.put("words", "k", writing("x"))
        cache.put("words", "l", writing("y"))
    assert caplog.text.count("cannot be written") == 1 and "--cache" in caplog.text
    assert cache.get("words", "k") == place and (place / "a.txt").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "list"])
def test_entry_that_cannot_be_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    cache = Cache(tmp_path)
    place = cache.put("words", "k", writing("x"))

    def fail(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    def scan(path: str, scandir=os.scandir):
        return fail(Path(path)) if os.fspath(path).endswith("deep") else scandir(path)

    with monkeypatch.context() as faulty:
        if call == "open":
            faulty.setattr("questpress.pipeline.runs.cache.sha256", fail)
        else:
            faulty.setattr(os, "scandir", scan)
        with pytest.raises(JobError, match=f"words/k could not be read .*{os.strerror(number)}.* It is kept"):
            cache.get("words", "k")
    assert cache.get("words", "k") == place


def test_full_disk_is_reported(tmp_path: Path) -> None:
    def write(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(JobError, match="No space left on device"):
        Cache(tmp_path).put("words", "k", write)
