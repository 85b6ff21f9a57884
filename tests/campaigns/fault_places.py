"""Read-only folders, and clocks that jump."""

import ctypes
import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, ERROR, Case, judge, read_files
from tests.campaigns.fault_flips import VERBS, command, run
from tests.campaigns.small_run import (
    find_differences,
    make_images,
    read_results,
    run_options,
    run_stages,
    start,
)

HOUR, YEAR = 3600.0, 365 * 86400.0


def mount_read_only(*folders: str) -> None:
    """Mount folders read-only, also for root, in this process and its children."""
    new_namespace = 0x00020000  # CLONE_NEWNS of sched.h
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for folder in folders:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def read_only(work: Path, _seed: int) -> Iterator[Case]:
    data = make_images(work / "pictures")
    run_stages(data, work / "whole", work / "before")
    expected = read_results(work / "whole")
    for stage in ("teacher", "student", "export", "report"):
        for places in (["run"], ["cache"], ["data"], ["run", "cache", "data"]):
            yield Case(
                f"{', '.join(places)} from {stage} on",
                ", ".join(places),
                "compress",
                partial(_try_read_only, work, data, work / "before" / stage, places, "compress", expected),
            )
    for verb in (*VERBS, "bench"):
        for places in (["run"], ["data"], ["run", "cache", "data"]):
            yield Case(
                f"{', '.join(places)} {verb} of a finished run",
                ", ".join(places),
                verb,
                partial(_try_read_only, work, data, work / "whole", places, verb, expected),
            )


def _try_read_only(
    work: Path, data: Path, base: Path, places: Sequence[str], verb: str, expected: dict[str, object]
) -> tuple[str, str]:
    out, log = work / "case", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    for name in ("run", "cache"):
        (out / name).mkdir(exist_ok=True)
    good = read_files(out)
    bench = ("bench", str(out / "run"), "--seconds", "0.02", "--threads", "1", "--quiet")
    arguments = bench if verb == "bench" else command(verb, data, out)
    folders = [str(data if name == "data" else out / name) for name in places]
    process = start(arguments, log, mount_read_only, *folders)
    process.join()
    errors = Path(f"{log}.err").read_text()
    verdict, sentence = judge(process.exitcode, errors, good, out, None)
    if verdict == DEFECT:
        return verdict, sentence
    if read_files(out) != good and "run" in places:
        return DEFECT, "a read-only folder has changed"
    if verb != "compress":
        return verdict, sentence
    if verdict == ERROR:
        code, errors, _ = run(arguments, log)
        if code:
            return DEFECT, f"after it became writable: exit code {code}: {errors.strip()[-1000:]}"
    # Nothing is added to a read-only cache.
    differs = [
        name
        for name in find_differences(read_results(out), expected)
        if not (verdict == EQUAL and "cache" in places and name.startswith("cache "))
    ]
    return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (verdict, sentence)


def shift_clock(seconds: float, random_shift: bool) -> None:
    """Shift the wall clock by a number of seconds, or each time by a random part of it."""
    draw, clock, local = random.Random(seconds), time.time, time.localtime

    def wrong() -> float:
        return clock() + seconds * (draw.uniform(-1, 1) if random_shift else 1)

    time.time = wrong
    time.time_ns = lambda: int(1e9 * wrong())
    time.localtime = lambda moment=None: local(wrong() if moment is None else moment)
    strftime = time.strftime
    time.strftime = lambda form, moment=None: strftime(form, local(wrong()) if moment is None else moment)


def clock(work: Path, _seed: int) -> Iterator[Case]:
    data = make_images(work / "pictures")
    run_stages(data, work / "whole", work / "before")
    expected = read_results(work / "whole")
    for seconds, random_shift in itertools.product((HOUR, -HOUR, YEAR, -YEAR), (False, True)):
        what = f"{'random, within ' if random_shift else ''}{_describe(seconds)}"
        yield Case(
            f"{what}, throughout",
            what,
            "compress",
            partial(_try_clock, work, data, (), seconds, random_shift, expected),
        )
        if not random_shift:
            between = (0.0, seconds, 0.0)
            yield Case(
                f"{what}, between stages", f"{what}, between stages", "compress",
                partial(_try_clock, work, data, between, seconds, random_shift, expected),
            )  # fmt: skip
            yield Case(
                f"files {what}", f"files {what}", "compress",
                partial(_try_file_times, work, data, seconds, expected),
            )  # fmt: skip


def _describe(seconds: float) -> str:
    unit, name = (YEAR, "a year") if abs(seconds) >= YEAR else (HOUR, "an hour")
    return f"{name} {'ahead' if seconds / unit > 0 else 'back'}"


def _try_clock(
    work: Path,
    data: Path,
    between: Sequence[float],
    seconds: float,
    random_shift: bool,
    expected: dict[str, object],
) -> tuple[str, str]:
    """Do the whole run with a wrong clock, or with clocks that change after prepare and export."""
    out, log = work / "case", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    parts = list(zip(("prepare", "export", None), between, strict=False)) or [(None, seconds)]
    for until, shift in parts:
        more = () if until is None else ("--until", until)
        process = start(run_options(data, out, "--quiet", *more), log, shift_clock, shift, random_shift)
        process.join()
        verdict = judge(
            process.exitcode, Path(f"{log}.err").read_text(), {}, out, expected if until is None else None
        )
        if verdict[0] != EQUAL:
            return DEFECT, verdict[1]
    return EQUAL, ""


def _try_file_times(work: Path, data: Path, seconds: float, expected: dict[str, object]) -> tuple[str, str]:
    """Resume a run whose files have modification times in the past or the future."""
    out, log = work / "case", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "before" / "export", out)
    moment = time.time() + seconds
    for file in [*out.rglob("*"), *data.rglob("*")]:
        os.utime(file, (moment, moment))
    code, errors, _ = run(run_options(data, out, "--quiet"), log)
    verdict = judge(code, errors, {}, out, expected)
    return verdict if verdict[0] == EQUAL else (DEFECT, verdict[1])
