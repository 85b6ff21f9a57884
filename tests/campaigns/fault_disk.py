"""A disk that is full after a random amount of writing: a tmpfs filled with ballast."""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, ERROR, Case, judge, read_files
from tests.campaigns.fault_flips import run
from tests.campaigns.small_run import (
    find_differences,
    make_images,
    read_results,
    run_options,
    run_stages,
    stages,
    start,
)

SIZE = 16 << 20
TIMES = 50
MIN_BYTES = {"everything": 300_000, "run": 300_000, "cache": 20_000, "temporary files": 250_000}
"""Bytes written to a place at least, from any stage on; a run rewrites its record and report."""

PLACES = ("everything", "run", "cache", "temporary files")


@contextmanager
def mount_small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def use_temporary_folder(folder: str) -> None:
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def _describe(errors: str, room: int) -> str:
    return "nothing is kept in the cache" if "nothing is kept" in errors else f"{room} bytes were enough"


def cases(work: Path, seed: int) -> Iterator[Case]:
    data = make_images(work / "pictures")
    run_stages(data, work / "whole", work / "before")
    expected = read_results(work / "whole")
    for number in range(TIMES):
        draw = random.Random(f"{seed} {number}")
        where, stage = PLACES[number % len(PLACES)], draw.choice(stages())
        yield Case(
            f"{number} {where}",
            where,
            f"compress, from {stage} on",
            partial(_try, data, work, where, stage, draw, expected),
        )


def _estimate_bytes(work: Path, where: str, stage: str) -> int:
    """Return about how many bytes are written to a place from this stage on."""

    def size(folder: Path) -> int:
        places = ("run", "cache") if where == "everything" else (where.split()[0],)
        return sum(f.stat().st_size for name in places for f in (folder / name).rglob("*") if f.is_file())

    return max(MIN_BYTES[where], size(work / "whole") - size(work / "before" / stage))


def _try(
    data: Path, work: Path, where: str, stage: str, draw: random.Random, expected: dict[str, object]
) -> tuple[str, str]:
    with mount_small_disk(work / "disk") as disk:
        try:
            return _try_on_disk(disk, data, work, where, stage, draw, expected)
        finally:
            shutil.rmtree(work / "case", ignore_errors=True)


def _try_on_disk(
    disk: Path,
    data: Path,
    work: Path,
    where: str,
    stage: str,
    draw: random.Random,
    expected: dict[str, object],
) -> tuple[str, str]:
    out, log = work / "case", work / "log"
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
    room = int(draw.uniform(0, _estimate_bytes(work, where, stage)))
    (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
    good = read_files(out)
    arguments = run_options(data, out, "--quiet")
    process = start(arguments, log, use_temporary_folder, str(out / "temporary"))
    process.join()
    errors = Path(f"{log}.err").read_text()
    # If the cache is full, entries are kept in a temporary folder until the process ends.
    kept_by_run = {name: content for name, content in expected.items() if not name.startswith("cache ")}
    verdict, sentence = judge(process.exitcode, errors, good, out, None)
    if verdict == EQUAL:
        results = read_results(out)
        differs = [name for name, content in kept_by_run.items() if results.get(name) != content]
        return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, _describe(errors, room))
    if verdict == DEFECT:
        return verdict, sentence
    half = [file.name for file in (out / "run").rglob(".*") if file.suffix in (".part", ".tmp")]
    (disk / "ballast").unlink()
    code, errors, _ = run(arguments, log)
    if code:
        return DEFECT, f"after space was freed: exit code {code}: {errors.strip()[-1000:]}"
    differs = [*half, *find_differences(read_results(out), expected)]
    return (
        (DEFECT, f"after space was freed, differ: {', '.join(differs[:5])}") if differs else (ERROR, sentence)
    )
