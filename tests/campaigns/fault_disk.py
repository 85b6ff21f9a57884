"""A disk that is full after a random amount of writing: a tmpfs with ballast that leaves just so much."""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, TOLD, Case, judged, kept
from tests.campaigns.fault_flips import run
from tests.campaigns.small_run import differences, left_by, pictures, run_options, staged, stages, start

SIZE = 16 << 20
TIMES = 50
LEAST = {"everything": 300_000, "run": 300_000, "cache": 20_000, "temporary files": 250_000}
"""Bytes that are written there from any stage on; of a run its record and report, again and again."""

ON_IT = ("everything", "run", "cache", "temporary files")


@contextmanager
def little_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def temporary_in(folder: str) -> None:
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def _told(said: str, room: int) -> str:
    return "nothing is kept in the cache" if "nothing is kept" in said else f"{room} bytes were enough"


def cases(work: Path, seed: int) -> Iterator[Case]:
    data = pictures(work / "pictures")
    staged(data, work / "whole", work / "before")
    expected = left_by(work / "whole")
    for number in range(TIMES):
        draw = random.Random(f"{seed} {number}")
        where, stage = ON_IT[number % len(ON_IT)], draw.choice(stages())
        yield Case(
            f"{number} {where}",
            where,
            f"compress, from {stage} on",
            partial(_try, data, work, where, stage, draw, expected),
        )


def _written(work: Path, where: str, stage: str) -> int:
    """About what is written there from this stage on: bytes."""

    def size(folder: Path) -> int:
        places = ("run", "cache") if where == "everything" else (where.split()[0],)
        return sum(f.stat().st_size for name in places for f in (folder / name).rglob("*") if f.is_file())

    return max(LEAST[where], size(work / "whole") - size(work / "before" / stage))


def _try(
    data: Path, work: Path, where: str, stage: str, draw: random.Random, expected: dict[str, object]
) -> tuple[str, str]:
    with little_disk(work / "disk") as disk:
        try:
            return _on(disk, data, work, where, stage, draw, expected)
        finally:
            shutil.rmtree(work / "case", ignore_errors=True)


def _on(
    disk: Path,
    data: Path,
    work: Path,
    where: str,
    stage: str,
    draw: random.Random,
    expected: dict[str, object],
) -> tuple[str, str]:
    out, told = work / "case", work / "told"
    out.mkdir()
    for name in ("run", "cache", "temporary"):
        place = (disk if where.startswith(("everything", name)) else out) / name
        before = work / "before" / stage / name
        if before.exists():
            shutil.copytree(before, place)
        else:
            place.mkdir()
        if place.parent != out:
            (out / name).symlink_to(place)
    room = int(draw.uniform(0, _written(work, where, stage)))
    (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
    good = kept(out)
    arguments = run_options(data, out, "--quiet")
    process = start(arguments, told, temporary_in, str(out / "temporary"))
    process.join()
    said = Path(f"{told}.err").read_text()
    # What the cache has no room for is kept elsewhere until the process ends.
    kept_by_run = {name: content for name, content in expected.items() if not name.startswith("cache ")}
    verdict, sentence = judged(process.exitcode, said, good, out, None)
    if verdict == EQUAL:
        found = left_by(out)
        differs = [name for name, content in kept_by_run.items() if found.get(name) != content]
        return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, _told(said, room))
    if verdict == DEFECT:
        return verdict, sentence
    half = [file.name for file in (out / "run").rglob(".*") if file.suffix in (".part", ".tmp")]
    (disk / "ballast").unlink()
    code, said, _ = run(arguments, told)
    if code:
        return DEFECT, f"with room again: exit code {code}: {said.strip()[-1000:]}"
    differs = [*half, *differences(left_by(out), expected)]
    return (DEFECT, f"with room again differ: {', '.join(differs[:5])}") if differs else (TOLD, sentence)
