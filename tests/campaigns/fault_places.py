"""Folders that may only be read, and clocks that jump."""

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

from tests.campaigns.fault_cases import DEFECT, EQUAL, TOLD, Case, judged, kept
from tests.campaigns.fault_flips import VERBS, command, run
from tests.campaigns.small_run import differences, left_by, pictures, run_options, staged, start

HOUR, YEAR = 3600.0, 365 * 86400.0


def only_read(*folders: str) -> None:
    """Mount folders so that nobody can write them, not even root; in this process and its children alone."""
    new_namespace = 0x00020000  # CLONE_NEWNS of sched.h
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for folder in folders:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def read_only(work: Path, _seed: int) -> Iterator[Case]:
    data = pictures(work / "pictures")
    staged(data, work / "whole", work / "before")
    expected = left_by(work / "whole")
    for stage in ("teacher", "student", "export", "report"):
        for places in (["run"], ["cache"], ["data"], ["run", "cache", "data"]):
            yield Case(
                f"{', '.join(places)} from {stage} on",
                ", ".join(places),
                "compress",
                partial(_read_only, work, data, work / "before" / stage, places, "compress", expected),
            )
    for verb in (*VERBS, "bench"):
        for places in (["run"], ["data"], ["run", "cache", "data"]):
            yield Case(
                f"{', '.join(places)} {verb} of a finished run",
                ", ".join(places),
                verb,
                partial(_read_only, work, data, work / "whole", places, verb, expected),
            )


def _read_only(
    work: Path, data: Path, base: Path, places: Sequence[str], verb: str, expected: dict[str, object]
) -> tuple[str, str]:
    out, told = work / "case", work / "told"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    for name in ("run", "cache"):
        (out / name).mkdir(exist_ok=True)
    good = kept(out)
    bench = ("bench", str(out / "run"), "--seconds", "0.02", "--threads", "1", "--quiet")
    arguments = bench if verb == "bench" else command(verb, data, out)
    folders = [str(data if name == "data" else out / name) for name in places]
    process = start(arguments, told, only_read, *folders)
    process.join()
    said = Path(f"{told}.err").read_text()
    verdict, sentence = judged(process.exitcode, said, good, out, None)
    if verdict == DEFECT:
        return verdict, sentence
    if kept(out) != good and "run" in places:
        return DEFECT, "a folder that may only be read has changed"
    if verb != "compress":
        return verdict, sentence
    if verdict == TOLD:
        code, said, _ = run(arguments, told)
        if code:
            return DEFECT, f"when it may be written again: exit code {code}: {said.strip()[-1000:]}"
    # Where the cache may only be read, nothing is kept in it.
    differs = [
        name
        for name in differences(left_by(out), expected)
        if not (verdict == EQUAL and "cache" in places and name.startswith("cache "))
    ]
    return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (verdict, sentence)


def shifted(seconds: float, restless: bool) -> None:
    """A wall clock that is wrong by so many seconds; a restless one each time by another share of them."""
    draw, clock, local = random.Random(seconds), time.time, time.localtime

    def wrong() -> float:
        return clock() + seconds * (draw.uniform(-1, 1) if restless else 1)

    time.time = wrong
    time.time_ns = lambda: int(1e9 * wrong())
    time.localtime = lambda moment=None: local(wrong() if moment is None else moment)
    strftime = time.strftime
    time.strftime = lambda form, moment=None: strftime(form, local(wrong()) if moment is None else moment)


def clock(work: Path, _seed: int) -> Iterator[Case]:
    data = pictures(work / "pictures")
    staged(data, work / "whole", work / "before")
    expected = left_by(work / "whole")
    for seconds, restless in itertools.product((HOUR, -HOUR, YEAR, -YEAR), (False, True)):
        what = f"{'restless, within ' if restless else ''}{_told(seconds)}"
        yield Case(
            f"{what}, throughout",
            what,
            "compress",
            partial(_clock, work, data, (), seconds, restless, expected),
        )
        if not restless:
            between = (0.0, seconds, 0.0)
            yield Case(
                f"{what}, between stages", f"{what}, between stages", "compress",
                partial(_clock, work, data, between, seconds, restless, expected),
            )  # fmt: skip
            yield Case(
                f"files {what}", f"files {what}", "compress",
                partial(_files_of, work, data, seconds, expected),
            )  # fmt: skip


def _told(seconds: float) -> str:
    unit, name = (YEAR, "a year") if abs(seconds) >= YEAR else (HOUR, "an hour")
    return f"{name} {'ahead' if seconds / unit > 0 else 'back'}"


def _clock(
    work: Path,
    data: Path,
    between: Sequence[float],
    seconds: float,
    restless: bool,
    expected: dict[str, object],
) -> tuple[str, str]:
    """The whole run under a wrong clock, or with clocks that change after the preparation and the export."""
    out, told = work / "case", work / "told"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    parts = list(zip(("prepare", "export", None), between, strict=False)) or [(None, seconds)]
    for until, shift in parts:
        more = () if until is None else ("--until", until)
        process = start(run_options(data, out, "--quiet", *more), told, shifted, shift, restless)
        process.join()
        verdict = judged(
            process.exitcode, Path(f"{told}.err").read_text(), {}, out, expected if until is None else None
        )
        if verdict[0] != EQUAL:
            return DEFECT, verdict[1]
    return EQUAL, ""


def _files_of(work: Path, data: Path, seconds: float, expected: dict[str, object]) -> tuple[str, str]:
    """A run that was stopped after its student, whose files are older or newer than now."""
    out, told = work / "case", work / "told"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "before" / "export", out)
    moment = time.time() + seconds
    for file in [*out.rglob("*"), *data.rglob("*")]:
        os.utime(file, (moment, moment))
    code, said, _ = run(run_options(data, out, "--quiet"), told)
    verdict = judged(code, said, {}, out, expected)
    return verdict if verdict[0] == EQUAL else (DEFECT, verdict[1])
